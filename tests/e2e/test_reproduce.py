"""A record is enough to make the run again: from other places, through a stop, and with the difference where there is one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conftest import ROOT, call, environment, train

TEMPLATE = "Ask: {}\nThink: {}\nAnswer: {}"


@pytest.fixture(scope="module")
def recorded(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on a folder, a file and a template of its own, all of which are then somewhere else."""
    home = tmp_path_factory.mktemp("recorded")
    shutil.copytree(llama, home / "model")
    shutil.copy(ROOT / "finetune" / "samples" / "en.jsonl", home / "rows.jsonl")
    (home / "template.txt").write_text(TEMPLATE)
    places = {"MODEL_NAME": "model", "DATASET_NAME": "rows.jsonl", "PROMPT_TEMPLATE": "template.txt"}
    train(home / "model", home / "out", DATASET_CONFIG="", MAX_STEPS=6, **{k: home / v for k, v in places.items()})
    moved = home / "moved"
    moved.mkdir()
    for name in places.values():
        (home / name).rename(moved / name)
    return dict(run=home / "out" / "run.json", moved={k: str(moved / v) for k, v in places.items()}, home=home)


def words(values: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]


def test_stopped_and_gone_on_with_from_other_places_and_untouched_by_the_environment(recorded: dict[str, Any]) -> None:
    command = ["reproduce", str(recorded["run"]), *words(recorded["moved"])]
    leaks = dict(
        LEARNING_RATE="3", SEED="1", PUSH_TO_HUB="1", OUTPUT_DIR=str(recorded["run"].parent), OMP_NUM_THREADS="1"
    )
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "entrypoint.py"), *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=environment(**leaks),
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "step 2/6" in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143, said
    assert (
        "not taken from the environment or .env, but from the record: LEARNING_RATE, OUTPUT_DIR, PUSH_TO_HUB, SEED"
        in said
    )

    on = call(*command, **leaks)
    assert on.returncode == 0, on.stdout + on.stderr
    assert "going on from" in on.stdout and f"REPRODUCED: {recorded['run']}" in on.stdout
    record = json.loads(recorded["run"].read_text())
    for name, entry in record["files"].items():
        assert not name.endswith(".safetensors") or f"{name:45} sha256 {entry['sha256']}" in on.stdout
    made = json.loads((recorded["home"] / "out-reproduced" / "run.json").read_text())
    assert made["environment"]["cpu_threads"] == record["environment"]["cpu_threads"]
    for name in ("adapter/adapter_config.json", "adapter/tokenizer.json", "merged/config.json"):
        assert made["files"][name] == record["files"][name], name

    again = call(*command, **leaks)
    assert again.returncode == 0 and "complete already" in again.stdout and "REPRODUCED" in again.stdout, again.stderr
    shard = next((recorded["home"] / "out-reproduced" / "merged").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    damaged = call(*command, **leaks)
    assert damaged.returncode == 5 and shard.name in damaged.stderr and "REPRODUCED" not in damaged.stdout


def test_a_changed_seed_is_named_with_the_first_step_that_differs(recorded: dict[str, Any], tmp_path: Path) -> None:
    command = ["reproduce", str(recorded["run"]), *words({**recorded["moved"], "OUTPUT_DIR": tmp_path, "SEED": 1})]
    answer = call(*command, "TOLERANCE=0.9")
    assert answer.returncode == 1 and "Traceback" not in answer.stderr, answer.stderr
    assert "setting SEED  3407  1" in answer.stdout and "losses: first difference at step " in answer.stdout
    assert "adapter/adapter_model.safetensors: recorded " in answer.stdout
    assert "TOLERANCE is for other hardware" in answer.stderr


def test_other_rows_another_model_or_another_template_are_refused_before_training(
    recorded: dict[str, Any], tmp_path: Path
) -> None:
    rows, model, template = tmp_path / "rows.jsonl", tmp_path / "model", tmp_path / "template.txt"
    lines = Path(recorded["moved"]["DATASET_NAME"]).read_text().splitlines(keepends=True)
    rows.write_text("".join([lines[1], lines[0], *lines[2:]]))
    shutil.copytree(recorded["moved"]["MODEL_NAME"], model)
    shard = sorted(model.glob("*.safetensors"))[1]
    weights = load_file(shard)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, shard, metadata={"format": "pt"})
    template.write_text("." + TEMPLATE)  # in front: the rows are cut off at their ends
    others = {"MODEL_NAME": model, "DATASET_NAME": rows, "PROMPT_TEMPLATE": template, "OUTPUT_DIR": tmp_path / "out"}
    answer = call("reproduce", str(recorded["run"]), *words(others))
    assert answer.returncode == 2 and "step 1/6" not in answer.stdout, answer.stdout
    assert f"error: MODEL_NAME={model}: {shard.name} is not that of the recorded run" in answer.stderr
    assert f"error: DATASET_NAME={rows}: these are not the rows" in answer.stderr
    assert answer.stderr.count("error: ") == 2, answer.stderr
    others |= recorded["moved"] | {"PROMPT_TEMPLATE": template}
    answer = call("reproduce", str(recorded["run"]), *words(others))
    assert answer.returncode == 2 and "step 1/6" not in answer.stdout, answer.stdout
    assert answer.stderr.startswith("error: tokens: ") and answer.stderr.count("error: ") == 1, answer.stderr
    assert "PROMPT_TEMPLATE" in answer.stderr


def test_tolerance_is_for_kernels_that_round_in_another_way(llama: Path, tmp_path: Path) -> None:
    """Another instruction set stands for another GPU: the same arithmetic in another order."""
    record = train(llama, tmp_path / "out", MAX_STEPS=6, LEARNING_RATE=0.01, ATEN_CPU_CAPABILITY="default")
    assert record["environment"]["variables"] == {"ATEN_CPU_CAPABILITY": "default"}
    command = ["reproduce", str(tmp_path / "out"), "SAVE_MERGED=0"]
    same = call(*command)
    assert same.returncode == 0 and "merged weights: only in the record, not compared" in same.stdout, same.stderr
    record["environment"]["variables"] = {}
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    command.append(f"OUTPUT_DIR={tmp_path / 'other'}")
    apart = call(*command)
    assert apart.returncode == 1 and "cpu_capability  " in apart.stdout, apart.stdout + apart.stderr
    near = call(*command, "TOLERANCE=0.01")
    assert near.returncode == 0 and "WITHIN TOLERANCE=0.01: the bytes differ" in near.stdout, near.stdout + near.stderr
    assert "cpu_capability  " in near.stdout and "losses: " in near.stdout  # which may be equal where the bytes are not
