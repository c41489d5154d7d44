"""Models made once a session, and the entrypoint as a program."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny

ROOT = Path(__file__).resolve().parent.parent
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and so it would be in all that tests start
# a free-running test: short rows of the bundled data, three updates, nothing asked
QUICK = {
    "DATASET_NAME": "samples", "DATASET_CONFIG": "en", "MAX_STEPS": "3", "PER_DEVICE_TRAIN_BATCH_SIZE": "1",
    "GRADIENT_ACCUMULATION_STEPS": "2", "WARMUP_STEPS": "1", "MAX_SEQ_LENGTH": "256", "MAX_NEW_TOKENS": "0",
    "LOGGING_STEPS": "1",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is no GPU, skip tests/gpu."""
    for item in items:
        if _needs_gpu(item):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and none is visible"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests of which all were skipped for want of a GPU are not done: the end is that of no tests at all, 5."""
    if session.exitstatus == pytest.ExitCode.OK and session.items and all(map(_needs_gpu, session.items)):
        import torch

        if not torch.cuda.is_available():
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def _needs_gpu(item: pytest.Item) -> bool:
    return ROOT / "tests" / "gpu" in item.path.parents


@pytest.fixture
def device() -> str:
    """Where a test computes; tests/gpu runs the same tests with another."""
    return "cpu"


@pytest.fixture(autouse=True)
def _stores(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test makes its own tokens, and leaves none."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("stores")))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("llama"), "llama", shards=True)


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("qwen2"), "qwen2", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("gpt2"), "gpt2", tie_word_embeddings=True)


def environment(**values: Any) -> dict[str, str]:
    """An environment without the user's own settings, offline and without a GPU."""
    kept = {
        k: os.environ[k]
        for k in (
            "PATH",
            "PYTHONPATH",
            "HOME",
            "XDG_CACHE_HOME",
            "HF_DATASETS_CACHE",
            "LANG",
            "TMPDIR",
            "OMP_WAIT_POLICY",
        )
        if k in os.environ
    }
    return {**kept, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **{k: str(v) for k, v in values.items()}}


def call(*words: str, cwd: Path = ROOT, timeout: float = 280, **values: Any) -> subprocess.CompletedProcess[str]:
    """`entrypoint.py WORDS` in an environment of `values` alone."""
    command = [sys.executable, str(ROOT / "entrypoint.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**values), cwd=cwd, timeout=timeout)


def train(model: Path, output: Path, **values: Any) -> dict[str, Any]:
    """A quick run that must succeed; its run.json."""
    answer = call("train", **{**QUICK, "MODEL_NAME": model, "OUTPUT_DIR": output, **values})
    assert answer.returncode == 0 and not answer.stderr, answer.stdout + answer.stderr
    record = dict(json.loads((output / "run.json").read_text()))
    assert not schema_errors(record)
    return record


def schema_errors(record: Any) -> list[str]:
    """Where `record` is not what the published schema of run.json says."""
    from jsonschema import Draft202012Validator

    schema = json.loads((ROOT / "finetune" / "run.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(record)]


def logits(base: Path, output: Path, ids: Any) -> tuple[Any, Any]:
    """In float32, for token `ids` of shape (1, n): logits of base + `output`/adapter, and of `output`/merged."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    both = PeftModel.from_pretrained(loaded, output / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(output / "merged", dtype=torch.float32).eval()
    with torch.inference_mode():
        return both(ids).logits, merged(ids).logits


@pytest.fixture(scope="session")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on a base of its own, which lies beside it. It is not to be changed."""
    home = tmp_path_factory.mktemp("finished")
    shutil.copytree(llama, home / "base")
    train(home / "base", home / "out", MAX_STEPS=2)
    return home / "out"
