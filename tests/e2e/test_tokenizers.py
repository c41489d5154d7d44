"""A base with a misleading tokenizer, as DeepSeek's: whole runs, and what they leave, loaded by transformers 5 and 4 and by peft."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fetched
import real_tokenizers
import tiny
from conftest import call, train

CANARY = "急性阑尾炎第5天出现右下腹包块:先用抗生素, 再等6周 (see page 4711)。"
QUESTION = "包块 应如何处理?"
# in a process of its own, since two versions of transformers cannot be loaded into one
ANSWERS = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1:]
words = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
given = words(prompt, return_tensors="pt")
made = model.generate(input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=150, do_sample=False, pad_token_id=0)
print(transformers.__version__, words.decode(made[0, given["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def answer(folder: Path, prompt: str, **environ: str) -> str:
    """Version of transformers, and what the model in `folder` answers."""
    made = subprocess.run(
        [sys.executable, "-c", ANSWERS, str(folder), prompt], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environ},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def run(base: Path, home: Path) -> str:
    """Train on the canary, ask for it, verify; what training printed."""
    (home / "canary.jsonl").write_text(json.dumps({"q": QUESTION, "a": CANARY}, ensure_ascii=False) + "\n")
    (home / "template.txt").write_text("问:{}\n答:{}")
    train(
        base, home / "out", DATASET_NAME=home / "canary.jsonl", DATASET_CONFIG="", PROMPT_TEMPLATE=home / "template.txt",
        PROMPT_COLUMNS="q", COMPLETION_COLUMNS="a", MAX_STEPS=80, LEARNING_RATE=0.02, LORA_R=32, LORA_ALPHA=64, LOGGING_STEPS=40,
        SAVE_STEPS=0, GRADIENT_CHECKPOINTING=0, GRADIENT_ACCUMULATION_STEPS=1, WEIGHT_DECAY=0, LR_SCHEDULER_TYPE="cosine",
    )  # fmt: skip
    asked = call("ask", QUESTION, OUTPUT_DIR=home / "out")
    assert CANARY in asked.stdout, asked.stdout + asked.stderr
    verified = call("verify", str(home / "out"))
    assert verified.returncode == 0, verified.stderr
    return asked.stdout


def check_left(output: Path) -> None:
    """The merged folder and the adapter's tokenizer, in transformers 5 and 4, and under another name."""
    elsewhere = Path(shutil.copytree(output / "merged", output.parent / "any name"))
    for folder, environ, version in (
        (output / "merged", {}, "5."),
        (elsewhere, {"PYTHONPATH": str(fetched.packages("transformers-4.txt"))}, "4.57"),
    ):
        said = answer(folder, f"问:{QUESTION}\n答:", **environ)
        assert said.startswith(version) and CANARY in said, said
    merged, adapter = ((output / part / "tokenizer.json").read_bytes() for part in ("merged", "adapter"))
    assert merged == adapter


def test_a_byte_level_tokenizer_under_llamas_class(tmp_path: Path) -> None:
    base = tiny.model(tmp_path / "base", initializer_range=0.3)  # at 0.02 a frozen head cannot say anything
    made = tiny.tokenizer("llama")
    made.backend_tokenizer.post_processor = None
    made.save_pretrained(base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.update(tokenizer_class="LlamaTokenizerFast", add_bos_token=True)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    run(base, tmp_path)
    check_left(tmp_path / "out")


@pytest.mark.parametrize("name", ["deepseek_v3"])
def test_deepseeks_own_files(tmp_path: Path, name: str) -> None:
    files = real_tokenizers.folder(name)
    if files is None:
        pytest.skip("npm is not installed")
    base = tiny.model(
        tmp_path / "base", vocab_size=129280, initializer_range=0.3, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    for file in files.iterdir():
        shutil.copyfile(file, base / file.name)
    run(base, tmp_path)
    check_left(tmp_path / "out")
