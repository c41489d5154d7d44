"""The host's memory: what this process has taken, and whether a run has enough of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from finetune.machine import limits
from finetune.settings import Settings

# GiB, each the lowest that was measured: a run that needs more than that is refused for certain. Python and the libraries hold
# 0.65 of their own; with 650 MiB a tiny run was killed, with 700 MiB it was not.
LIBRARIES = 0.7
ON_A_GPU = 0.6  # CUDA and the compiler: 1.5 in all were seen on an H100
TOKENIZING = 0.2  # of each process that tokenizes, beside what it shares with the first


def peak_gib() -> float:
    """The most that this process has held at once, in GiB.

    By /proc: `getrusage` also counts the process that started this one, as it was then.
    """
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) / 2**20 if found else 0.0


def of_gpu(max_memory: float | None) -> float:
    """Bytes of GPU memory that this process may hold. max_memory: GiB at the most; None: all that is free."""
    import torch  # `check` needs none

    free, _ = torch.cuda.mem_get_info()
    may = float(free + torch.cuda.memory_reserved())
    return min(may, max_memory * 2**30) if max_memory else may


def available_gib() -> float:
    """GiB of the host's memory that this container, job or machine may use."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(limits.memory() or machine, machine) / 2**30


def forecast_gib(settings: Settings, count: int | None, gpu: bool) -> float:
    """The least of the host's memory that a run takes. count: the model's parameters, None: unknown."""
    # layers are packed one after the other: a model of 478M in NF4, its embeddings in float32, took 0.5 GiB at most
    each = 0.5 if settings.load_in_4bit else 2 if settings.dtype in ("bfloat16", "float16") else 4
    weights = 0 if gpu else each * (count or 0) / 2**30
    return LIBRARIES + ON_A_GPU * gpu + max(weights, TOKENIZING * (settings.dataset_num_proc - 1))


def too_small(settings: Settings, count: int | None, gpu: bool) -> Iterator[str]:
    """The sentence for a limit below the forecast: the system kills what exceeds it, without a word."""
    limit = limits.memory()
    have = available_gib()
    if have >= (needed := forecast_gib(settings, count, gpu)):
        return
    enough = max(2, round(1.5 * needed + 0.5))
    fewer = forecast_gib(settings.replaced(dataset_num_proc=1), count, gpu)
    ways = [f"use fewer processes that tokenize: DATASET_NUM_PROC=1 (then {fewer:.1f} GiB)"] if fewer <= have else []
    if limit is not None:
        where = "this container or job may use"
        ways.append(
            f"raise its limit, for example docker run --memory {enough}g, resources.limits.memory: {enough}Gi in Kubernetes, "
            f"or --mem={enough}G with Slurm"
        )
    else:
        where = "this machine has"
        ways.append("take a smaller model, or a machine with more")
    yield (
        f"memory: the run needs at least {needed:.1f} GiB of the host's memory, and {where} {have:.1f} GiB. It would be killed "
        f"(exit code 137). Remedy: {'; or '.join(ways)}."
    )
