"""What decides a result besides settings and inputs: this machine and this program, as run.json has them."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import __version__, files
from finetune.environment import NUMERIC
from finetune.run.record import Environment

if TYPE_CHECKING:
    from finetune.machine.gpus import Gpu

PACKAGES = (
    *(
        "torch",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "accelerate",
        "datasets",
        "huggingface-hub",
        "tokenizers",
    ),
    *("safetensors", "unsloth", "unsloth-zoo", "triton", "numpy"),
)
ROOT = Path(__file__).resolve().parent.parent.parent


def environment(gpu: Gpu | None, environ: Mapping[str, str]) -> Environment:
    """All of it, as JSON values. gpu: the one that training uses."""
    import torch  # not at the top: the engine comes first, and decides what is imported before torch

    build = ROOT / "build.json"
    made = json.loads(build.read_bytes()) if build.is_file() else {}
    return Environment(
        program=__version__,
        revision=made.get("revision") or _git("rev-parse", "HEAD"),
        dirty=made["dirty"] if "dirty" in made else bool(_git("status", "--porcelain")),
        image=bool(made),
        lock_sha256=made.get("lock_sha256") or _lock(),
        python=platform.python_version(),
        platform=platform.platform(),
        packages=versions(),
        gpu=gpu.name if gpu else None,
        gpu_capability=".".join(map(str, gpu.capability)) if gpu else None,
        driver=gpu.driver if gpu else None,
        cuda=torch.version.cuda if gpu else None,
        cpu=_cpu(),
        cpu_threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        variables={name: environ[name] for name in NUMERIC if environ.get(name)},
    )


def _lock() -> str | None:
    """sha256 of the lock that `make` installed (with an older driver, the one for CUDA 12.8), otherwise of the lock beside the program."""
    stamp, lock = Path(sys.prefix) / ".stamp-main", ROOT / "docker" / "requirements.txt"
    try:
        return stamp.read_text(encoding="utf-8").split()[1]  # after the version of Python: scripts/bootstrap.sh
    except (OSError, IndexError):
        return files.sha256(lock) if lock.is_file() else None


def _cpu() -> str | None:
    """The CPU's kind. A virtual machine may hide the name; family and model tell the generation all the same."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return None
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{said.get('model name')}, family {said.get('cpu family')}, model {said.get('model')}"


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*words: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
