"""Stopped and killed runs go on where they were, and end in the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from conftest import QUICK, ROOT, call, environment, train
from finetune import files
from finetune.training import checkpoints

WEIGHTS = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "merged/model.safetensors.index.json")
TOP = {"README.md", "curves.png", "metrics.jsonl", "report.html", "run.json", "samples.md"}
# held-out rows are measured in between, and the best adapter is kept: both have to come out the same
LONG = {
    **QUICK, "MAX_STEPS": "12", "SAVE_STEPS": "3", "MAX_SEQ_LENGTH": "288", "DATASET_SPLIT": "train[0:8]", "EVAL_STEPS": "3",
    "LOAD_BEST_MODEL_AT_END": "1",
}  # fmt: skip


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
def undisturbed_folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    train(llama, output, **LONG)
    return output


@pytest.fixture(scope="module")
def undisturbed(undisturbed_folder: Path) -> dict[str, Any]:
    return dict(json.loads((undisturbed_folder / "run.json").read_text()))


def test_sigterm_saves_a_checkpoint_and_the_next_run_goes_on(
    llama: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    process = start(llama, tmp_path)
    read_until(process, "step 4/12")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 10, said
    assert "SIGTERM: a checkpoint is saved after this update (updates take about " in said
    saved = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith("checkpoint-")}
    assert saved - {"checkpoint-3"}, said  # one made at the signal
    assert not (tmp_path / "run.json").exists() and not (tmp_path / "adapter").exists()
    record = train(llama, tmp_path, **LONG)
    assert record["training"]["resumed_from"] >= 4
    assert record["training"]["losses"] == undisturbed["training"]["losses"] and weights(record) == weights(undisturbed)


def test_a_signal_while_loading(llama: Path, tmp_path: Path) -> None:
    process = start(llama, tmp_path)
    read_until(process, "engine:")
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 129 and "SIGHUP: ending now" in said and not list(tmp_path.iterdir()), said


def killed_at(moment: str, model: Path, output: Path, seconds: float, rng: random.Random) -> bool:
    """Start the run and kill it at `moment`: loading, after a step, or as soon as a path below `output` is there.

    Returns whether it was hit: whether what was being written still had its temporary name. seconds: what loading takes.
    """
    before = changed(output / moment)  # what an earlier kill left there is not what this run writes
    process = start(model, output)
    if moment == "loading":
        time.sleep(rng.uniform(0.1, 0.9) * seconds)
    elif moment == "step":
        read_until(process, "step ")
        time.sleep(rng.uniform(0, 0.1))
    else:
        while changed(output / moment) in (None, before):
            assert process.poll() is None, f"{moment} never came:\n{process.communicate()[0]}"
            time.sleep(0.0003)
        time.sleep(rng.uniform(0, 0.003))
    process.kill()
    process.communicate()
    return "partial" not in moment or changed(output / moment) not in (None, before)


def alive(process: int) -> bool:
    """Whether it runs; one that is dead may still wait for the first process to take note."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def changed(path: Path) -> int | None:
    """When what is at `path` was last changed, in ns; None: it is not there."""
    try:
        return path.stat().st_ctime_ns
    except FileNotFoundError:
        return None


def assert_whole(output: Path, wanted: dict[str, str]) -> None:
    """What has its final name is complete: known weights have their hash, checkpoints the hashes they were written with."""
    names = {"checkpoints", *TOP, "adapter", "merged"}
    assert not [p.name for p in output.iterdir() if p.name not in names and not p.name.endswith((".partial", ".old"))]
    for name, sha in wanted.items():
        assert not (output / name).parent.exists() or files.sha256(output / name) == sha, name
    for folder in checkpoints.folders(output / "checkpoints"):
        expected = json.loads((folder / "sha256.json").read_text())
        assert files.digests(folder, expected) == expected and "optimizer.pt" in expected


@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", "1"))))
def test_ten_kills_one_after_the_other(llama: Path, tmp_path: Path, undisturbed: dict[str, Any], seed: int) -> None:
    """Each is followed by the same command, which meets the next one; the last of them ends in the same bytes.

    KILLS=5 makes five times ten, at other moments.
    """
    rng, timings = random.Random(seed), undisturbed["timings"]
    loading = timings["import_s"] + timings["data_s"] + timings["load_s"]
    checkpoint, merging = "checkpoints/partial", "merged.partial/model-00002-of-00003.safetensors"
    moments = [
        "loading",
        checkpoint,
        "step",
        checkpoint,
        "loading",
        "step",
        "adapter.partial",
        merging,
        "loading",
        "merged",
    ]
    for moment in moments:
        for _ in range(3):  # a few milliseconds are easily missed on a busy machine
            hit = killed_at(moment, llama, tmp_path, loading, rng)
            assert not (tmp_path / "run.json").exists()
            assert_whole(tmp_path, weights(undisturbed))
            if hit:
                break
        assert hit, moment
    record = train(llama, tmp_path, **LONG)
    assert record["training"]["resumed_from"] == 12
    assert record["training"]["losses"] == undisturbed["training"]["losses"] and weights(record) == weights(undisturbed)
    assert record["evaluation"] == undisturbed["evaluation"] and len(record["evaluation"]["course"]) == 5
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoints", *TOP, "adapter", "merged"}


def test_a_killed_tokenizing_process_is_told_and_none_outlives_a_killed_run(llama: Path, tmp_path: Path) -> None:
    lines = (tiny.SAMPLES / "en.jsonl").read_text() * 400
    (tmp_path / "rows.jsonl").write_text(lines)

    def tokenizing() -> tuple[subprocess.Popen[str], list[int]]:
        many = {
            "DATASET_NAME": tmp_path / "rows.jsonl",
            "DATASET_CONFIG": "",
            "DATASET_SPLIT": "train",
            "DATASET_NUM_PROC": 3,
        }
        process = start(llama, tmp_path / "out", **many)
        place = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(children := place.read_text().split()) < 3:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        time.sleep(0.3)
        return process, [int(child) for child in children]

    process, children = tokenizing()
    os.kill(children[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 3 and "error: DATASET_NUM_PROC=3: a process that tokenizes was killed" in said, said
    process, children = tokenizing()
    process.kill()
    process.communicate()
    time.sleep(0.5)
    assert not [child for child in children if alive(child)]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "unlisted"])
def test_each_damage_to_a_checkpoint_is_named(
    undisturbed_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = Path(shutil.copytree(undisturbed_folder / "checkpoints", tmp_path / "checkpoints"))
    older, newest = checkpoints.folders(folder)
    assert checkpoints.newest(folder) == newest and capsys.readouterr().out == ""
    target = newest / ("sha256.json" if damage == "unlisted" else "adapter_model.safetensors")
    content = target.read_bytes()
    if damage == "missing":
        target.unlink()
    else:
        target.write_bytes(
            content[:-1] + bytes([content[-1] ^ 1]) if damage == "flipped" else content[: len(content) // 2]
        )
    assert checkpoints.newest(folder) == older
    said = capsys.readouterr().out
    problem = "has no readable list of hashes" if damage == "unlisted" else f"damaged or missing: {target.name}"
    assert f"{newest}: {problem}; it is removed, and the checkpoint before it is used" in said
    (older / "optimizer.pt").write_bytes(b"")
    assert checkpoints.newest(folder) is None and f"{older}: damaged" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", "[]", "5", "null", '["optimizer.pt"]', "[" * 100_000])
def test_a_list_of_hashes_that_is_none_is_damage(tmp_path: Path, content: str) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    (tmp_path / "checkpoint-3" / "sha256.json").write_text(content)
    (tmp_path / "checkpoint-4").symlink_to(tmp_path / "gone")
    assert checkpoints.newest(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_saved_anew_and_no_whole_one_goes_for_it(
    llama: Path, tmp_path: Path, undisturbed_folder: Path
) -> None:
    shutil.copytree(undisturbed_folder / "checkpoints", tmp_path / "checkpoints")
    for damaged in checkpoints.folders(tmp_path / "checkpoints"):
        (damaged / "optimizer.pt").write_bytes(b"")
    values = {**LONG, "SAVE_TOTAL_LIMIT": 1}
    process = start(llama, tmp_path, **values)
    read_until(process, "step 5/12")
    process.kill()
    process.communicate()
    found = checkpoints.newest(tmp_path / "checkpoints")
    assert found is not None and found.name == "checkpoint-3"
    train(llama, tmp_path, **values)
    found = checkpoints.newest(tmp_path / "checkpoints")
    assert found is not None and found.name == "checkpoint-12"


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
    assert refused.returncode == 5 and "already holds adapter" in refused.stderr
    assert call("train", **values, OVERWRITE=1).returncode == 0 and (tmp_path / "notes.txt").read_text() == "mine"
