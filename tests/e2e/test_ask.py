"""`ask` where the base was moved, changed or lost, and where weights are damaged."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from conftest import call, train
from finetune.errors import MachineError
from finetune.inference import answer
from finetune.settings import Settings
from finetune.verbs import ask as verb


@pytest.fixture(scope="module")
def original(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `moved`, which was `base` when `out` was trained on it."""
    home = tmp_path_factory.mktemp("ask")
    shutil.copytree(llama, home / "base")
    train(home / "base", home / "out", MAX_STEPS=2)
    (home / "base").rename(home / "moved")
    return home


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(original / "out", tmp_path / "out"))


def ask(output: Path, **values: Any) -> subprocess.CompletedProcess[str]:
    return call("ask", "What is it?", OUTPUT_DIR=output, MAX_NEW_TOKENS=4, **values)


def test_model_name_says_where_the_base_is_now(original: Path, run: Path) -> None:
    shutil.rmtree(run / "merged")  # nothing else can answer
    found = ask(run, MODEL_NAME=original / "moved")
    assert found.returncode == 0 and found.stdout.strip() and found.stderr == ""


def test_the_merged_weights_answer_where_the_base_is_lost(run: Path) -> None:
    found = ask(run)
    assert found.returncode == 0, found.stderr
    note, said = found.stdout.split("\n", 1)
    assert (
        note.startswith("the merged weights answer") and note.endswith("MODEL_NAME says where it is") and said.strip()
    )


def test_without_them_the_sentence_names_the_setting(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "merged")
    found = ask(run)
    assert found.returncode == 2 and "is not on this machine" in found.stderr
    assert "for example MODEL_NAME=/models/base" in found.stderr and "Traceback" not in found.stderr
    other = ask(run, MODEL_NAME=tiny.model(tmp_path / "other", initializer_range=0.03))
    assert other.returncode == 2 and "is no longer the base of this run" in other.stderr, other.stderr


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (shutil.rmtree(run / "adapter"), _cut(next((run / "merged").glob("*-00001-*.safetensors")))), "the run wrote"),
        (lambda run: _cut(run / "adapter" / "adapter_model.safetensors"), "the run wrote"),
        (lambda run: (run / "adapter" / "adapter_config.json").write_text("{"), "the run wrote"),
    ],
)  # fmt: skip
def test_damaged_weights_are_no_traceback(
    original: Path, run: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(run)
    found = ask(run, MODEL_NAME=original / "moved")
    assert found.returncode == 5 and words in found.stderr and str(run) in found.stderr, found.stderr
    assert "Traceback" not in found.stderr


def test_a_full_gpu_is_a_sentence(original: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    settings = Settings.from_env({"OUTPUT_DIR": str(run), "MODEL_NAME": str(original / "moved")})
    with monkeypatch.context() as patched:
        patched.setattr(AutoModelForCausalLM, "from_pretrained", full)
        with pytest.raises(MachineError, match="its weights do not fit the GPU's memory"):
            verb.run(settings, {}, "What is it?")
    monkeypatch.setattr(answer, "answer", full)
    with pytest.raises(MachineError, match=r"out of GPU memory .*MAX_NEW_TOKENS=200\.$"):
        verb.run(settings, {}, "What is it?")
