#!/usr/bin/env python3
"""The short smoke run that benchmarks/smoke-cpu/run.json records. As a program: records it again, after a change that is meant to change it.

The pins make ATen and MKL take code that every x86-64 CPU with AVX2 has, and the model's name is relative, so that the record
holds nothing of the machine that wrote it but its kind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "smoke-cpu" / "run.json"
SHORT = {
    "MAX_STEPS": "4", "WARMUP_STEPS": "1", "MAX_SEQ_LENGTH": "128", "GRADIENT_ACCUMULATION_STEPS": "1", "MAX_NEW_TOKENS": "0",
    "LOGGING_STEPS": "1", "OUTPUT_DIR": "out", "OMP_NUM_THREADS": "2",
    "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2",
}  # fmt: skip


def model() -> Path:
    """The smoke test's model folder, made where it is not there yet."""
    made = subprocess.run([sys.executable, ROOT / "scripts" / "smoke_model.py"], stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    return Path(made.stdout.strip())


def record(folder: Path, environ: dict[str, str]) -> Path:
    """Make the run in `folder`; its run.json."""
    base = model()
    (folder / base.name).symlink_to(base)
    values = {**environ, **SHORT, "MODEL_NAME": f"./{base.name}", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, ROOT / "scripts" / "smoke.py"], cwd=folder, env=values, check=True, stdout=sys.stderr)  # fmt: skip
    return folder / "out" / "run.json"


def kind(environment: dict[str, Any]) -> dict[str, Any]:
    """What has to be equal before equal bytes are promised, from run.json's `environment`."""
    python, libc = environment["python"].rpartition(".")[0], environment["platform"].rpartition("-")[2]
    cpu = "one that made these bytes" if environment["cpu"] in cpus() else environment["cpu"]
    return {"cpu": cpu, "python": python, "libc": libc, **environment["packages"]}


def cpus() -> set[str]:
    """The kinds of CPU that made the committed bytes. Each has its own record beside the one that is reproduced."""
    return {json.loads(path.read_text())["environment"]["cpu"] for path in RECORD.parent.glob("*.json")}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(record(Path(scratch), dict(os.environ)), RECORD)
    print(RECORD, json.dumps(kind(json.loads(RECORD.read_text())["environment"]), indent=2))
