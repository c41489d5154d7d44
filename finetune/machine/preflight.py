"""Checks this machine before anything is downloaded. Without torch the answer takes only tenths of a second."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from finetune import files
from finetune.environment import COMPILED
from finetune.errors import MachineError, SettingsError
from finetune.machine import container, cuda, disk, limits, memory
from finetune.machine.gpus import Gpu, cuda_version, number
from finetune.settings import Settings

CPU_PARAMETERS = 500_000_000  # ENGINE=auto trains nothing larger without a GPU: 135M already makes 45 tokens/s
# Oldest driver for each CUDA major version (12.x by minor-version compatibility). scripts/bootstrap.sh reads it here.
DRIVERS = {13: 580, 12: 525}
OLDEST_CAPABILITY = (7, 5)  # the torch wheels hold kernels for sm_75 to sm_120
# Processes and threads of a run: 10 were seen on two CPUs, and 44 with a GPU on 32. Pools grow with the CPUs.
TASKS, TASKS_WITH_GPU = 10, 10


def check(
    settings: Settings, visible: list[Gpu], environ: Mapping[str, str], count: int | None,
    missing: Sequence[str] = (), damaged: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Lines that say what was found. Raises MachineError with every problem and its remedy.

    count: parameters of the model, None: unknown. missing, damaged: sentences on the files that settings name. If
    one is missing, it raises SettingsError instead.
    """
    problems = [
        *missing,
        *damaged,
        *gpu_problems(settings, visible, count, environ),
        *cuda.problems(visible, environ),
        *compiler(visible, environ),
        *memory.too_small(settings, count, bool(visible)),
        *tasks(bool(visible)),
        *disk.unwritable(settings, environ),
        *disk.too_small(settings, environ, count),
    ]
    if problems:
        raise (SettingsError if missing else MachineError)(*problems)
    lines = [f"GPU: {g.name}, {g.memory / 1024:.0f} GiB, driver {g.driver}" for g in visible] or ["GPU: none visible"]
    if len(visible) > 1:
        lines.append("GPU: only the first is used; CUDA_VISIBLE_DEVICES chooses another")
    if count:
        lines.append(f"model: {settings.model_name}, {_billions(count)} parameters")
    output = Path(settings.output_dir)
    free = shutil.disk_usage(files.existing(output)).free
    lines.append(f"OUTPUT_DIR: {settings.output_dir}, {free / 2**30:.0f} GiB free")
    if container.image() and (why := container.lost(output)):
        lines.append(
            f"note: OUTPUT_DIR={settings.output_dir} goes away with this container, since {why}. To keep the results: "
            f"{container.command(environ, container.mounted(output) + ' ' + container.CACHE)}"
        )
    return lines


def tasks(gpu: bool) -> Iterator[str]:
    """The sentence for a limit of processes that a run would meet: it would end with a thread that cannot be started."""
    left = limits.pids()
    needed = TASKS + (os.cpu_count() or 1) + TASKS_WITH_GPU * gpu
    if left is not None and left < needed:
        yield (
            f"processes: {left} more processes and threads may be started here, and a run needs about {needed}. Raise the limit, "
            f"for example docker run --pids-limit {max(512, 4 * needed)}, or podPidsLimit of the kubelet in Kubernetes."
        )


def gpu_problems(
    settings: Settings, visible: list[Gpu], count: int | None, environ: Mapping[str, str]
) -> Iterator[str]:
    """Sentences on a GPU that is missing, too old, or has too old a driver."""
    if not visible:
        run = container.command(environ)
        if settings.engine == "unsloth":
            yield (f"No GPU is visible, and ENGINE=unsloth needs one. With a GPU: {run}. Without: ENGINE=transformers.")
        elif settings.engine == "auto" and count is not None and count > CPU_PARAMETERS:
            yield (
                f"No GPU is visible, and {settings.model_name} with {_billions(count)} parameters is too large for a "
                f"CPU. With a GPU: {run} (nvidia-smi must list it). Without: `make smoke` trains a small model; "
                "ENGINE=transformers trains this one on the CPU, for days."
            )
        return
    gpu, cuda = visible[0], cuda_version()
    needed = DRIVERS.get(cuda[0], 0)
    if 0 < number(gpu.driver.partition(".")[0]) < needed:
        other = (
            ", the image for CUDA 12.8 (make image CUDA=12.8), or `make train` without Docker, which installs the "
            "packages for CUDA 12.8 by itself where it finds an old driver"
        )
        yield (
            f"The NVIDIA driver {gpu.driver} is too old: this build uses CUDA {cuda[0]}.{cuda[1]}, which needs driver "
            f"{needed} or newer. Use a newer driver{other if cuda[0] > 12 else ''}."
        )
    if (0, 0) < gpu.capability < OLDEST_CAPABILITY:
        found, oldest = (".".join(map(str, version)) for version in (gpu.capability, OLDEST_CAPABILITY))
        yield (
            f"{gpu.name} has compute capability {found}; torch no longer holds kernels below {oldest}. "
            "Use a GPU from the Turing generation on (T4, RTX 20, A10, A100, L4, RTX 30/40/50, H100)."
        )
    if settings.dtype == "bfloat16" and (0, 0) < gpu.capability < (8, 0):
        yield f"DTYPE=bfloat16: {gpu.name} computes bfloat16 only by emulation; use DTYPE=auto or DTYPE=float16"


def compiler(visible: list[Gpu], environ: Mapping[str, str]) -> Iterator[str]:
    """What Triton needs to compile the launchers of its kernels. Without it the first update would fail."""
    if not visible:
        return
    path = environ.get("PATH", os.defpath)
    if not any(shutil.which(name, path=path) for name in (environ.get("CC", ""), "gcc", "clang") if name):
        yield (
            "No C compiler is found, and GPU kernels need one. Install it (apt-get install gcc), or give its path, for "
            "example CC=/usr/bin/gcc."
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        yield (
            f"{header} is missing, and GPU kernels are compiled with it. Install it (apt-get install python3-dev), or "
            "use a Python that has it: `make train PYTHON=…`, or one that uv brings."
        )
    for name in COMPILED:
        if (place := environ.get(name)) and not files.runs_programs(Path(place)):
            yield (
                f"{name}={place}: no program can be loaded from there (mounted noexec), and GPU kernels are. Give a folder where one "
                f"can, for example {name}=/outputs/kernels, or with docker run --read-only: --tmpfs /tmp:exec"
            )


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"
