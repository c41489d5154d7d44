"""Stopped and killed runs go on where they were, and end in the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import QUICK, ROOT, call, environment, train

WEIGHTS = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "merged/model.safetensors.index.json")
LONG = {**QUICK, "MAX_STEPS": "12", "SAVE_STEPS": "3", "MAX_SEQ_LENGTH": "128"}


def start(model: Path, output: Path, **values: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "entrypoint.py"), "train"], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=environment(**{**LONG, "MODEL_NAME": model, "OUTPUT_DIR": output, **values}),
    )  # fmt: skip


def read_until(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if word in line:
            return said
    raise AssertionError(f"{word} never came:\n{said}")


def weights(record: dict[str, Any]) -> dict[str, str]:
    return {n: e["sha256"] for n, e in record["files"].items() if n in WEIGHTS or n.startswith("merged/model-")}


@pytest.fixture(scope="module")
def undisturbed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(llama, tmp_path_factory.mktemp("whole") / "out", **LONG)


def test_sigterm_saves_a_checkpoint_and_the_next_run_goes_on(
    llama: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    process = start(llama, tmp_path)
    read_until(process, "step 4/12")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 10, said
    saved = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith("checkpoint-")}
    assert saved - {"checkpoint-3"}, said  # one made at the signal
    assert not (tmp_path / "run.json").exists() and not (tmp_path / "adapter").exists()
    record = train(llama, tmp_path, **LONG)
    assert record["training"]["resumed_from"] >= 4
    assert record["training"]["losses"] == undisturbed["training"]["losses"] and weights(record) == weights(undisturbed)


def test_sigterm_while_loading(llama: Path, tmp_path: Path) -> None:
    process = start(llama, tmp_path)
    read_until(process, "engine:")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", "3"))))
def test_sigkill_at_a_random_moment(llama: Path, tmp_path: Path, undisturbed: dict[str, Any], seed: int) -> None:
    """KILLS=10 makes ten of them."""
    seconds = undisturbed["timings"]["total_s"]
    process = start(llama, tmp_path)
    time.sleep(random.Random(seed).uniform(0.4, 1.0) * seconds)
    process.kill()
    process.communicate()
    for path in tmp_path.glob("*"):
        assert path.name.endswith((".partial", ".old")) or path.name in ("checkpoints", "adapter", "merged", "run.json", "metrics.jsonl", "curves.png", "samples.md", "report.html", "README.md")  # fmt: skip
    record = train(llama, tmp_path, **LONG)
    assert weights(record) == weights(undisturbed)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    llama: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    process = start(llama, tmp_path)
    read_until(process, "step 7/12")
    process.kill()
    process.communicate()
    newest = tmp_path / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    answer = call("train", **{**LONG, "MODEL_NAME": llama, "OUTPUT_DIR": tmp_path})
    assert answer.returncode == 0, answer.stderr
    assert "checkpoint-6: damaged or missing: optimizer.pt" in answer.stdout and "going on from" in answer.stdout
    assert weights(json.loads((tmp_path / "run.json").read_text())) == weights(undisturbed)


def test_other_settings_are_refused_with_the_difference_and_overwrite_starts_afresh(
    llama: Path, tmp_path: Path
) -> None:
    process = start(llama, tmp_path)
    read_until(process, "step 4/12")
    process.kill()
    process.communicate()
    values = {**LONG, "MODEL_NAME": llama, "OUTPUT_DIR": tmp_path, "SEED": 1, "MAX_STEPS": 2}
    refused = call("train", **values)
    assert refused.returncode == 2 and "SEED: was 3407, is now 1" in refused.stderr
    fresh = call("train", **values, OVERWRITE=1)
    assert fresh.returncode == 0 and "going on from" not in fresh.stdout, fresh.stderr
    assert json.loads((tmp_path / "run.json").read_text())["training"]["steps"] == 2


def test_a_folder_with_strangers_files_is_not_overwritten(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    values = {**QUICK, "MODEL_NAME": llama, "OUTPUT_DIR": tmp_path}
    refused = call("train", **values)
    assert refused.returncode == 2 and "already holds adapter" in refused.stderr
    assert call("train", **values, OVERWRITE=1).returncode == 0 and (tmp_path / "notes.txt").read_text() == "mine"
