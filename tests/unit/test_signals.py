"""Signals are told at once, and a run that was killed is told by the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from finetune import console
from finetune.machine import limits
from finetune.run import last
from finetune.training.trainer import Stop

BUSY = """
import hashlib, signal, sys
from finetune.machine import signals
signals.listen()
print([number.name for number in signals.heeded()], flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)  # a long call into C: no handler of Python's runs meanwhile
"""


def started(code: str, *before: str) -> subprocess.Popen[str]:
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen([*before, sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=environ)


def test_a_signal_is_told_while_the_program_is_busy() -> None:
    process = started(BUSY)
    assert process.stdout and process.stderr and "SIGHUP" in process.stdout.readline()
    time.sleep(0.5)  # now it is busy
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "SIGTERM: ending now\n" and time.monotonic() - began < 2
    assert process.poll() is None  # busy still
    process.kill()
    process.communicate()


def test_it_is_told_before_the_program_ends() -> None:
    code = (
        "import os, signal; from finetune.machine import signals; signals.listen(); os.kill(os.getpid(), signal.SIGHUP)"
    )
    process = started(code)
    assert process.communicate(timeout=30) == ("", "SIGHUP: ending now\n") and process.returncode == 129


def test_what_nohup_ignores_stays_ignored() -> None:
    process = started(BUSY, "sh", "-c", 'trap "" HUP; exec "$@"', "sh")
    assert process.stdout and "SIGHUP" not in process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)
    process.kill()
    process.communicate()


def test_the_first_signal_in_training_is_noted_and_the_second_one_ends() -> None:
    stop, before = Stop(), signal.getsignal(signal.SIGHUP)
    with stop.on_signals([]):
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal == signal.SIGHUP
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGHUP)
        assert ended.value.code == 129
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_run_that_was_killed_is_told_by_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "memory", lambda: 2**30)
    with last.noted(tmp_path):
        console.phase("loading", "a line")
        left = (tmp_path / last.NOTE).read_bytes()
    with pytest.raises(SystemExit), last.noted(tmp_path):
        raise SystemExit(143)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == "a line\n"
    for found, phase in ((left, "loading"), (b"", "it was starting")):
        (tmp_path / last.NOTE).write_bytes(found)
        with last.noted(tmp_path):
            pass
        said = capsys.readouterr().out
        assert f"was killed while {phase}. Most often memory ran out (exit code 137, here 1.0 GiB)" in said
        assert "--memory" in said and "DATASET_NUM_PROC=1" in said
