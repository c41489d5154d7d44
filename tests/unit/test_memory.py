"""What a process is said to have held is its own, and not that of the process that started it."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT


def test_the_peak_is_that_of_the_process_alone() -> None:
    code = "from finetune.machine import memory; kept = bytearray(200 * 2**20); kept[::4096] = bytes(len(kept[::4096])); print(memory.peak_gib())"
    large = bytearray(600 * 2**20)
    large[::4096] = bytes(len(large[::4096]))
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.19 < float(made.stdout) < 0.5
    assert len(large) == 600 * 2**20
