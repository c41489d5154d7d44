"""The image's health check on the heartbeat that the program writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from finetune import console
from finetune.errors import Refusal
from finetune.run import recipe
from finetune.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("healthcheck", ROOT / "docker/healthcheck.py")
assert spec is not None and spec.loader is not None
healthcheck = importlib.util.module_from_spec(spec)
spec.loader.exec_module(healthcheck)


@pytest.mark.parametrize(
    ("phase", "timeout", "later", "verdict"),
    [
        ("training", 60, 59, (0, "training: the last update ended 59 s ago")),
        ("training", 60, 61, (1, "hangs: no update has ended for 61 s (HEALTH_TIMEOUT=60)")),
        ("training", 0, 10**6, (0, "training: the last update ended 1000000 s ago")),
        ("loading", 60, 3600, (0, "loading, since 3600 s")),
    ],
)
def test_the_check_reads_what_the_run_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, timeout: float, later: float, verdict: tuple[int, str]
) -> None:
    environ = {"FINETUNE_STATE_DIR": str(tmp_path)}
    assert healthcheck.verdict(environ, 0) == (0, "no run here yet")
    monkeypatch.setattr(console, "_state", None)
    console.beat_in(tmp_path, timeout)
    console.beat(phase)
    began = json.loads((tmp_path / "heartbeat.json").read_text())["time"]
    assert healthcheck.verdict(environ, began + later) == verdict


def test_a_run_that_begins_is_not_taken_for_the_one_that_hung_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `docker restart` keeps /tmp: loading again takes longer than the last beat may be old
    monkeypatch.setattr(console, "_state", None)
    console.beat_in(tmp_path, 60)
    (tmp_path / "heartbeat.json").write_text('{"phase": "training", "time": 0, "timeout": 60}')
    environ = {"FINETUNE_STATE_DIR": str(tmp_path)}
    assert healthcheck.verdict(environ, 61)[0] == 1
    with pytest.raises(Refusal):
        recipe.run(Settings.from_env({"MODEL_NAME": str(tmp_path), "OUTPUT_DIR": str(tmp_path / "out")}), {})
    assert healthcheck.verdict(environ, 61)[0] == 0
