"""The committed record of the smoke run, made again from nothing but that file and the model from the package index."""

from __future__ import annotations

import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest

import smoke_record
from conftest import ROOT, call, environment, schema_errors
from finetune.run import provenance

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed record, or one made now where this machine is of a kind for which the committed bytes are not promised."""
    committed = json.loads(smoke_record.RECORD.read_text())
    assert not schema_errors(committed)
    old, here = (smoke_record.kind(e) for e in (committed["environment"], provenance.environment(None, {})))
    if different := sorted(name for name in {*old, *here} if old.get(name) != here.get(name)):
        warnings.warn(
            f"benchmarks/smoke-cpu/run.json comes from another kind of machine ({', '.join(f'{n}: {old.get(n)}, here {here.get(n)}' for n in different)}); "
            "a record made now is reproduced in its stead",
            stacklevel=1,
        )
        return smoke_record.record(tmp_path_factory.mktemp("recorded"), environment())
    return smoke_record.RECORD


def reproduce(path: Path, output: Path, **values: Any) -> subprocess.CompletedProcess[str]:
    words = {"MODEL_NAME": smoke_record.model(), "OUTPUT_DIR": output, **values}
    return call("reproduce", str(path), *(f"{k}={v}" for k, v in words.items()), timeout=840)


def test_the_smoke_run_is_reproduced_from_its_record(recorded: Path, tmp_path: Path) -> None:
    answer = reproduce(recorded, tmp_path / "out")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f"REPRODUCED: {recorded}" in answer.stdout
    made, record = (json.loads(path.read_text()) for path in (tmp_path / "out" / "run.json", recorded))
    assert made["training"]["losses"] == record["training"]["losses"]
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "adapter/adapter_config.json"):
        assert made["files"][name] == record["files"][name], name
    assert made["environment"]["variables"] == record["environment"]["variables"]


def test_with_a_changed_seed_the_first_differing_step_is_said(recorded: Path, tmp_path: Path) -> None:
    record = json.loads(recorded.read_text())
    record["settings"]["SEED"] += 1
    (tmp_path / "seed.json").write_text(json.dumps(record))
    answer = reproduce(tmp_path / "seed.json", tmp_path / "out", SAVE_MERGED=0)
    assert answer.returncode == 1 and "Traceback" not in answer.stderr, answer.stderr
    made = json.loads((tmp_path / "out" / "run.json").read_text())
    losses = zip(record["training"]["losses"], made["training"]["losses"], strict=True)
    step = next(number for number, (old, new) in enumerate(losses, 1) if old != new)
    assert f"losses: first difference at step {step}: recorded " in answer.stdout
    assert "not reproduced" in answer.stderr and str(ROOT) not in recorded.read_text()
