"""`make smoke` on SmolLM2-135M, the embedded default: a real model, real NF4, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, environment, logits, schema_errors

pytestmark = pytest.mark.timeout(900)  # two minutes where nothing else runs


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("smoke") / "out"
    script = [sys.executable, str(ROOT / "scripts" / "smoke.py")]
    answer = subprocess.run(script, capture_output=True, text=True, env=environment(OUTPUT_DIR=output), timeout=840)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    record = json.loads((output / "run.json").read_text())
    return dict(output=output, said=answer.stdout, record=record, base=Path(record["settings"]["MODEL_NAME"]))


def test_the_loss_falls_in_real_4_bits_within_2_gb(smoke: dict[str, Any]) -> None:
    losses = smoke["record"]["training"]["losses"]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.5
    assert smoke["record"]["settings"]["LOAD_IN_4BIT"] is True
    assert smoke["record"]["memory"]["process_gib"] < 2.0
    assert not schema_errors(smoke["record"])


def test_it_ends_by_telling_where_everything_is(smoke: dict[str, Any]) -> None:
    last = smoke["said"].splitlines()[-10:]
    for word in ("before: ", "after: ", str(smoke["output"] / "merged"), str(smoke["output"] / "report.html")):
        assert any(word in line for line in last), last


def test_what_changed_and_what_did_not(smoke: dict[str, Any]) -> None:
    adapter = load_file(smoke["output"] / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 30 * 7 * 2 and all(value.abs().sum() > 0 for value in adapter.values())
    base = load_file(smoke["base"] / "model.safetensors")
    merged = load_file(smoke["output"] / "merged" / "model.safetensors")
    assert base.keys() == merged.keys()
    for name, value in base.items():
        assert torch.equal(value, merged[name]) != (name.split(".")[-2].endswith("_proj")), name


def test_merged_logits_equal_base_plus_adapter(smoke: dict[str, Any]) -> None:
    wanted, found = logits(smoke["base"], smoke["output"], torch.arange(1000, 1040)[None])
    # every changed weight is rounded once to 16 bits (2^-9 relative); 30 layers add such errors up, to about 1 %
    assert (wanted - found).abs().mean() < 0.02 * wanted.abs().mean()
    assert (wanted.argmax(-1) == found.argmax(-1)).float().mean() > 0.9
