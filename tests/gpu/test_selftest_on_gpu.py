"""The self-test on a GPU: everything is right there, within a minute."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from conftest import call


def test_all_is_good_within_a_minute(tmp_path: Path) -> None:
    began = time.monotonic()
    given = ",".join(map(str, range(torch.cuda.device_count())))
    caches = dict(TRITON_CACHE_DIR=tmp_path / "triton", TORCHINDUCTOR_CACHE_DIR=tmp_path / "inductor")  # cold
    done = call("selftest", OUTPUT_DIR=tmp_path / "out", CUDA_VISIBLE_DEVICES=given, **caches)
    assert done.returncode == 0 and time.monotonic() - began < 60, done.stdout + done.stderr
    for name in ("driver", "CUDA", "Triton", "bitsandbytes", "attention", "model"):
        assert f"ok          {name} " in done.stdout, done.stdout
    assert "compiled, loss" in done.stdout and ("NCCL" in done.stdout) == (torch.cuda.device_count() > 1)
