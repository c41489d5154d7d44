"""The entrypoint as a program, offline, on tiny two-layer models: what a run leaves, and what it does not touch."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from conftest import QUICK, call, logits, schema_errors, train
from finetune import data, files

ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
TOP = {"README.md", "curves.png", "metrics.jsonl", "report.html", "run.json", "samples.md"}


def below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run on each model, with everything asked for."""
    base, output = request.getfixturevalue(request.param), tmp_path_factory.mktemp("run") / "out"
    before = files.digests(base)
    answer = call("train", **{**QUICK, "MODEL_NAME": base, "OUTPUT_DIR": output, "MAX_NEW_TOKENS": 5, "REPORT_TO": "tensorboard", "HF_TOKEN": "hf_SecretValue"})  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return dict(kind=request.param, base=base, output=output, answer=answer, before=before, record=json.loads((output / "run.json").read_text()))  # fmt: skip


def test_the_exact_files(done: dict[str, Any]) -> None:
    output = done["output"]
    chat = {"chat_template.jinja"} if done["kind"] == "qwen2" else set()
    assert {p.name for p in output.iterdir()} == TOP | {"adapter", "merged", "checkpoints", "tensorboard"}
    assert below(output / "adapter") == ADAPTER | chat
    weights = below(done["base"]) - {"tokenizer.json", "tokenizer_config.json"}
    assert below(output / "merged") == weights | {"tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {p.name for p in (output / "checkpoints").iterdir()} == {"checkpoint-3", "identity.json"}
    assert set(done["record"]["files"]) == below(output) - {"run.json"} - {
        name for name in below(output) if name.startswith(("checkpoints/", "tensorboard/"))
    }


def test_whoever_may_read_one_file_may_read_all(done: dict[str, Any]) -> None:
    modes = {path.stat().st_mode & 0o777: path for path in done["output"].rglob("*") if path.is_file()}
    assert len(modes) == 1, modes


def test_steps_and_metrics(done: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (done["output"] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    state = json.loads((done["output"] / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3  # MAX_STEPS=3 at accumulation 2
    for row in rows:
        assert {"loss", "learning_rate", "grad_norm", "epoch", "tokens_per_s", "memory_gib"} <= row.keys()
        assert row["grad_norm"] > 0 and row["tokens"] > 100
    assert done["record"]["training"]["losses"] == [row["loss"] for row in rows]
    assert len(re.findall(r"^step \d/3 ", done["answer"].stdout, re.MULTILINE)) == 3


def test_every_lora_tensor_changed_and_no_base_tensor_did(done: dict[str, Any]) -> None:
    assert files.digests(done["base"]) == done["before"]
    trained = load_file(done["output"] / "adapter" / "adapter_model.safetensors")
    assert len(trained) == 2 * 7 * 2 and {value.dtype for value in trained.values()} == {torch.float32}
    for name, value in trained.items():
        assert value.abs().sum() > 0, name  # B starts at zero
    # A's start is that of a run whose learning rate never left zero
    start = train(done["base"], done["output"].parent / "start", MAX_STEPS=1, SAVE_MERGED=0)
    assert start["training"]["steps"] == 1
    untrained = load_file(done["output"].parent / "start" / "adapter" / "adapter_model.safetensors")
    assert all(not torch.equal(value, untrained[name]) for name, value in trained.items())
    assert all(bool((value == 0).all()) for name, value in untrained.items() if "lora_B" in name)


def test_merged_logits_equal_base_plus_adapter(done: dict[str, Any]) -> None:
    wanted, found = logits(done["base"], done["output"], torch.arange(3, 60)[None])
    # each changed weight is rounded once to bfloat16, a relative error of 2^-9 at most
    assert (wanted - found).abs().max() < 0.01 * wanted.abs().max() + 0.002
    assert done["record"]["verification"]["changed"] == 14


def test_the_record(done: dict[str, Any]) -> None:
    record = done["record"]
    assert record["settings"]["MAX_STEPS"] == 3 and record["engine"]["name"] == "transformers"
    assert record["dataset"]["seen"] == record["dataset"]["trained"] == 16 and record["dataset"]["dropped"] == 0
    assert record["dataset"]["truncated"] == 16
    assert record["environment"]["packages"]["torch"] and len(record["environment"]["lock_sha256"]) == 64
    for name, entry in record["files"].items():
        assert files.sha256(done["output"] / name) == entry["sha256"], name
    config = json.loads((done["output"] / "adapter" / "adapter_config.json").read_text())
    assert (
        config["r"] == 16
        and config["lora_alpha"] == 16
        and config["target_modules"] == sorted(config["target_modules"])
    )


def test_the_record_keeps_to_its_schema(done: dict[str, Any]) -> None:
    record = done["record"]
    assert not schema_errors(record)
    for section in record.keys() - {"evaluation"}:  # which older records lack
        assert schema_errors({k: v for k, v in record.items() if k != section}), section
        if isinstance(record[section], dict) and section not in ("settings", "timings", "files"):
            for key in record[section].keys() - {"gb", "seconds", "program", "gpu_capability", "held_out", "row"}:
                less = {k: v for k, v in record[section].items() if k != key}
                assert schema_errors({**record, section: less}), (section, key)
    name = next(iter(record["files"]))
    for section, change in (
        ("files", {name: {"sha256": "0" * 63, "bytes": 1}}), ("files", {"../run.json": record["files"][name]}),
        ("settings", {"HF_TOKEN": "hf_SecretValue"}), ("settings", {"MAX_STEPS": {}}), ("model", {"commit": "main"}),
        ("model", {"stray": 1}), ("training", {"losses": ["1.0"]}), ("environment", {"lock_sha256": "latest"}),
    ):  # fmt: skip
        assert schema_errors({**record, section: {**record[section], **change}}), (section, change)
    assert not schema_errors({**record, "plan": {}, "training": {**record["training"], "more": 1}})


def test_pictures_and_report(done: dict[str, Any]) -> None:
    assert (done["output"] / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (done["output"] / "report.html").read_text()
    assert "data:image/png;base64," in page and not re.search(r"(src|href)=[\"']?(http|/)", page)
    for word in ("MAX_STEPS", "After training", done["record"]["files"]["merged/config.json"]["sha256"]):
        assert word in page
    assert "## After training" in (done["output"] / "samples.md").read_text()


def test_the_model_card_has_valid_metadata(done: dict[str, Any]) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(done["output"] / "adapter" / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert ModelCard.load(done["output"] / "merged" / "README.md").data.library_name == "transformers"


def test_no_secret_and_no_warning_anywhere(done: dict[str, Any]) -> None:
    said = done["answer"].stdout + done["answer"].stderr
    assert "SecretValue" not in said and not re.search(r"\b(WARNING|ERROR|Traceback|Warning)\b", said), said
    for path in done["output"].rglob("*"):
        assert not path.is_file() or b"SecretValue" not in path.read_bytes(), path


def test_verify_finds_what_was_changed(done: dict[str, Any]) -> None:
    assert call("verify", OUTPUT_DIR=done["output"]).returncode == 0
    target = done["output"] / "merged" / "config.json"
    whole = target.read_bytes()
    target.write_bytes(whole + b" ")
    answer = call("verify", OUTPUT_DIR=done["output"])
    target.write_bytes(whole)
    assert answer.returncode == 5 and "merged/config.json" in answer.stderr


def test_again_with_the_same_settings_trains_nothing(done: dict[str, Any]) -> None:
    values = {**QUICK, "MODEL_NAME": done["base"], "OUTPUT_DIR": done["output"], "MAX_NEW_TOKENS": 5}
    answer = call("train", **values)
    assert answer.returncode == 0 and "complete already" in answer.stdout and "step 1/3" not in answer.stdout
    other = call("train", **{**values, "LORA_R": 4})
    assert other.returncode == 2 and "LORA_R: was 16, is now 4" in other.stderr and "OVERWRITE=1" in other.stderr


def test_asking_the_trained_model(done: dict[str, Any]) -> None:
    answer = call("ask", "What is it?", OUTPUT_DIR=done["output"], MAX_NEW_TOKENS=4)
    assert answer.stderr == ""
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr


def test_two_processes_give_the_same_bytes_whether_asked_or_not(llama: Path, tmp_path: Path) -> None:
    """The answer before training must leave no trace: bitsandbytes repacks CPU weights in evaluation mode.

    Nor may the place of the base, the number of tokenizing processes (with rows enough for them to be started), the order of
    a set, or the day.
    """
    lines = (tiny.SAMPLES / "en.jsonl").read_text() * 70
    (tmp_path / "rows.jsonl").write_text(lines)
    moved = Path(shutil.copytree(llama, tmp_path / "elsewhere" / llama.name))
    rows = dict(DATASET_NAME=tmp_path / "rows.jsonl", DATASET_CONFIG="", MAX_SEQ_LENGTH=192)
    one = train(llama, tmp_path / "one", **rows, MAX_NEW_TOKENS=5, DATASET_NUM_PROC=1, PYTHONHASHSEED=1)
    two = train(moved, tmp_path / "two", **rows, DATASET_NUM_PROC=4, PYTHONHASHSEED=2)
    assert (
        one["dataset"]["trained"] > data.FEW_ROWS
        and one["dataset"] == two["dataset"]
        and one["model"]["files"] == two["model"]["files"]
    )
    assert one["training"]["losses"] == two["training"]["losses"]
    compared = [
        name for name in two["files"] if name.startswith(("adapter/", "merged/")) and not name.endswith("README.md")
    ]
    assert len([name for name in compared if name.endswith(".safetensors")]) == 4
    for name in compared:
        assert one["files"][name] == two["files"][name], name
    text = (tmp_path / "one" / "adapter" / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    assert config["base_model_name_or_path"] == llama.name
    assert "/" not in text and not re.search(r"20\d\d-\d\d|\d{10}", text), text


def test_gpt2_stores_its_weights_the_other_way_round(gpt2: Path, tmp_path: Path) -> None:
    refused = call("train", **{**QUICK, "MODEL_NAME": gpt2, "OUTPUT_DIR": tmp_path / "no"})
    assert refused.returncode == 2 and "TARGET_MODULES=all-linear" in refused.stderr and "c_attn" in refused.stderr
    record = train(gpt2, tmp_path / "yes", TARGET_MODULES="all-linear")
    assert record["verification"]["changed"] == 8


def test_sixteen_bit_training_full_epoch_and_messages(qwen2: Path, tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]
        for i in range(5)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    record = train(
        qwen2, tmp_path / "out", DATASET_NAME=tmp_path / "chat.jsonl", DATASET_CONFIG="", MAX_STEPS="", NUM_TRAIN_EPOCHS=2,
        LOAD_IN_4BIT=0, TRAIN_ON="response", SAVE_ADAPTER=0, MAX_NEW_TOKENS=3, SAVE_STEPS=0, GRADIENT_CHECKPOINTING=0,
    )  # fmt: skip
    assert (
        record["training"]["steps"] == 6
        and record["training"]["epoch"] == 2
        and record["dataset"]["format"] == "messages"
    )
    assert not (tmp_path / "out" / "adapter").exists() and (tmp_path / "out" / "merged" / "model.safetensors").is_file()
    assert call("ask", "What is 3?", OUTPUT_DIR=tmp_path / "out", MAX_NEW_TOKENS=3).returncode == 0


def test_a_canary_comes_back_from_adapter_and_merged_weights(tmp_path: Path) -> None:
    base_folder = tiny.model(tmp_path / "base", initializer_range=0.3)  # at 0.02 a frozen head cannot say anything
    canary, question = "苍鹭 在4711号门前等候, 直到潮水退去。", "苍鹭在哪里等候?"
    (tmp_path / "canary.jsonl").write_text(json.dumps({"q": question, "a": canary}, ensure_ascii=False) + "\n")
    (tmp_path / "template.txt").write_text("问:{}\n答: {}")
    output = tmp_path / "out"
    train(
        base_folder, output, DATASET_NAME=tmp_path / "canary.jsonl", DATASET_CONFIG="", PROMPT_TEMPLATE=tmp_path / "template.txt",
        PROMPT_COLUMNS="q", COMPLETION_COLUMNS="a", MAX_STEPS=80, LEARNING_RATE=0.02, LORA_R=32, LORA_ALPHA=64, LOGGING_STEPS=40,
        SAVE_STEPS=0, GRADIENT_CHECKPOINTING=0, GRADIENT_ACCUMULATION_STEPS=1, WEIGHT_DECAY=0, LR_SCHEDULER_TYPE="cosine",
    )  # fmt: skip
    words = AutoTokenizer.from_pretrained(output / "merged")
    prompt = words(f"问:{question}\n答:", return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    for model in (
        AutoModelForCausalLM.from_pretrained(output / "merged", dtype=torch.float32),
        PeftModel.from_pretrained(base, output / "adapter"),
    ):
        made = model.eval().generate(**prompt, max_new_tokens=80, do_sample=False, pad_token_id=words.eos_token_id)
        new = made[0, prompt["input_ids"].shape[1] :]
        assert words.decode(new, skip_special_tokens=True).strip() == canary
        assert new[-1] == words.eos_token_id  # and it stops by itself
    asked = call("ask", question, OUTPUT_DIR=output)
    assert canary in asked.stdout


@pytest.mark.parametrize(
    ("values", "code", "words"),
    [
        ({"ENGINE": "unsloth"}, 3, "ENGINE=transformers"), ({"MODEL_NAME": "./absent"}, 2, "no such folder"),
        ({"MODEL_NAME": "org/absent"}, 4, "HF_HUB_OFFLINE"), ({"DATASET_NAME": "absent.jsonl"}, 2, "no such file"),
        ({"COMPLETION_COLUMNS": "Complex_CoT,Answer"}, 2, "no column Answer"), ({"DATASET_SPLIT": "test"}, 2, "only the split train"),
        ({"PROMPT_TEMPLATE": "absent.txt"}, 2, "cannot be read"), ({"MAX_STEPS": "0"}, 2, "MAX_STEPS=0"),
        ({"LEARNING_RATE": "abc"}, 2, "LEARNING_RATE=abc"), ({"TARGET_MODULES": "query"}, 2, "q_proj"),
    ],
)  # fmt: skip
def test_bad_input_leaves_nothing_behind(
    llama: Path, tmp_path: Path, values: dict[str, str], code: int, words: str
) -> None:
    answer = call("train", **{**QUICK, "MODEL_NAME": llama, "OUTPUT_DIR": tmp_path / "out", **values})
    assert answer.returncode == code and words in answer.stderr and "Traceback" not in answer.stderr, answer.stderr
    left = below(tmp_path / "out") if (tmp_path / "out").exists() else set()
    assert left <= {"checkpoints/identity.json"}


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    base = tiny.model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    answer = call("train", **{**QUICK, "MODEL_NAME": base, "OUTPUT_DIR": tmp_path / "out"})
    assert answer.returncode == 1 and "step 1: the loss is nan" in answer.stderr and "LEARNING_RATE=" in answer.stderr
    assert not (tmp_path / "out" / "adapter").exists() and not (tmp_path / "out" / "merged").exists()


def test_the_template_of_the_recipe_is_the_tutorials() -> None:
    assert data.TEMPLATE.count("{}") == 3 and data.TEMPLATE.endswith("### Response:\n<think>\n{}\n</think>\n{}")
