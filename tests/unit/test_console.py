"""What is said while something lasts."""

from __future__ import annotations

import re
import time

import pytest

from finetune import console


def test_a_stage_is_never_silent_for_long(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "SILENCE", 0.2)
    monkeypatch.setattr(console, "SILENCE_LATER", 10)
    monkeypatch.setattr(console, "PATIENT", 0.5)
    with console.stage("loading", "loading the model"):
        time.sleep(1.2)
    first, *said, last = capsys.readouterr().out.splitlines()
    assert first == "loading the model" and re.fullmatch(r"loading the model: 1 s", last)
    assert 1 <= len(said) <= 3 and all(re.fullmatch(r"loading the model: [01] s so far", line) for line in said)
    time.sleep(0.3)
    assert not capsys.readouterr().out  # it has ended


def test_a_short_stage_is_one_line_and_an_error_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    with console.stage("loading", "loading the model"):
        pass
    with pytest.raises(OSError, match="gone"), console.stage("saving", "saving"):
        raise OSError("gone")
    assert capsys.readouterr().out == "loading the model\nsaving\n"
