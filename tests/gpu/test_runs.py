"""Whole runs on a GPU: the compiled path to the same bytes twice, unsloth's engine, and a model that sees."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from conftest import QUICK, ROOT, call, train
from unit.test_held_out import file

ON_GPU = {"CUDA_VISIBLE_DEVICES": "0", "MAX_STEPS": "8", "WARMUP_STEPS": "0", "LEARNING_RATE": "1e-2"}


def adapter(output: Path) -> dict[str, Any]:
    """The trained adapter, every tensor of which training has changed: B began as zero."""
    weights = load_file(output / "adapter" / "adapter_model.safetensors")
    assert weights and all(w.abs().sum() > 0 for name, w in weights.items() if "lora_B" in name)
    return weights


def trained(record: dict[str, Any]) -> None:
    """It took its updates, and the last ones' losses are lower than the first ones'."""
    losses = record["training"]["losses"]
    assert len(losses) == 8 and all(map(math.isfinite, losses)) and max(losses[-2:]) < min(losses[:2])


def test_the_compiled_path_gives_the_same_adapter_twice(llama: Path, tmp_path: Path) -> None:
    records = [train(llama, tmp_path / name, **ON_GPU) for name in ("first", "second")]
    for record, name in zip(records, ("first", "second"), strict=True):
        trained(record)
        assert adapter(tmp_path / name) and record["engine"]["name"] == "transformers" and record["engine"]["compiled"]
        assert record["training"]["plan"]["forecast_gib"] > 0  # planned by measuring
    first, second = (record["files"]["adapter/adapter_model.safetensors"]["sha256"] for record in records)
    assert first == second


@pytest.mark.parametrize("checkpointing", ["unsloth", "false"])
@pytest.mark.parametrize("four_bits", ["1", "0"])
def test_unsloth_trains(llama: Path, tmp_path: Path, checkpointing: str, four_bits: str) -> None:
    values = dict(ENGINE="unsloth", GRADIENT_CHECKPOINTING=checkpointing, LOAD_IN_4BIT=four_bits)
    record = train(llama, tmp_path, **ON_GPU, **values)
    trained(record)
    assert record["engine"]["name"] == "unsloth" and adapter(tmp_path)
    assert record["training"]["plan"]["recomputed"] == (2 if checkpointing == "unsloth" else 0)
    assert record["verification"]


def test_unsloth_answers_before_and_after(llama: Path, tmp_path: Path) -> None:
    """Its own generation changes the model, and training goes on after it."""
    trained(train(llama, tmp_path, ENGINE="unsloth", **{**ON_GPU, "MAX_NEW_TOKENS": "8"}))
    adapter(tmp_path)


def test_measuring_held_out_rows_changes_no_byte_of_training(llama: Path, tmp_path: Path) -> None:
    """On the compiled path, with memory below that of training."""
    rows = file(tmp_path / "rows.jsonl", range(80))
    values = {"DATASET_NAME": rows, "DATASET_CONFIG": "", "DATASET_SPLIT": "train[0:40]", "SAVE_MERGED": 0, **ON_GPU}
    without = train(llama, tmp_path / "without", EVAL_ROWS=0, **values)
    found = train(llama, tmp_path / "with", EVAL_STEPS=4, MAX_NEW_TOKENS=16, **values)
    assert found["engine"]["compiled"] and found["training"]["losses"] == without["training"]["losses"]
    assert all(
        torch.equal(value, adapter(tmp_path / "without")[name]) for name, value in adapter(tmp_path / "with").items()
    )
    assert found["evaluation"]["rows"] == 40 and found["evaluation"]["change"]["high"] < 0
    assert found["memory"]["training_gib"] <= 1.01 * without["memory"]["training_gib"]
    assert len(found["samples"]["held_out"]) == 3 and all(
        row["before"] and row["after"] for row in found["samples"]["held_out"]
    )


def test_all_paths_measure_the_same_base(llama: Path, tmp_path: Path) -> None:
    rows = file(tmp_path / "rows.jsonl", range(40))
    values = {
        "DATASET_NAME": rows,
        "DATASET_CONFIG": "",
        "DATASET_SPLIT": "train[0:20]",
        "SAVE_MERGED": 0,
        **ON_GPU,
        "MAX_STEPS": 2,
    }
    paths: dict[str, dict[str, Any]] = {
        "compiled": {},
        "padded": {"TORCH_COMPILE": 0},
        "unsloth": {"ENGINE": "unsloth"},
    }
    found = {name: train(llama, tmp_path / name, **values, **more)["evaluation"] for name, more in paths.items()}
    for name in ("padded", "unsloth"):
        for mine, other in zip(found["compiled"]["each"], found[name]["each"], strict=True):
            assert mine["before"] == pytest.approx(other["before"], rel=0.02) and mine["labels"] == other["labels"], (
                name
            )


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_unsloth_adapts_only_the_text_decoder_of_a_model_that_sees(tmp_path: Path, kind: str) -> None:
    """Or refuses the model with the way out; it never trains what it should not, and never ends in a traceback."""
    folder, output = tiny.seeing(tmp_path / kind, kind), tmp_path / "run"
    values = {**QUICK, "MODEL_NAME": folder, "OUTPUT_DIR": output, "ENGINE": "unsloth", "SAVE_MERGED": "0", **ON_GPU}
    answer = call("train", **values)
    if answer.returncode == 2:
        assert "ENGINE=transformers" in answer.stdout + answer.stderr
        return
    assert answer.returncode == 0, answer.stdout + answer.stderr
    trained(json.loads((output / "run.json").read_text()))
    assert all("language_model." in name for name in adapter(output))


def test_bitsandbytes_still_waits_after_each_tensor() -> None:
    """Where this fails, `patches.optimizer_does_not_wait` can go."""
    script = ROOT / "docs" / "upstream" / "bitsandbytes-optimizer-waits.py"
    shown = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 1 and "448 waits a step" in shown.stdout, shown.stdout + shown.stderr
