"""The GPUs that nvidia-smi lists, and the CUDA version of this build. No torch, which would take a second to answer."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import subprocess
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One visible GPU. Memory in MiB."""

    name: str
    memory: int
    free: int
    driver: str
    capability: tuple[int, int]


def gpus(environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves visible, as nvidia-smi lists them; empty where there is no driver."""
    columns = "index,uuid,name,memory.total,memory.free,driver_version,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, env=dict(environ))
    except (OSError, subprocess.SubprocessError):
        return []
    if answer.returncode != 0:
        return []
    found: dict[str, Gpu] = {}
    for line in answer.stdout.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 7:
            index, uuid, name, memory, free, driver, capability = fields
            major, _, minor = capability.partition(".")
            version = (number(major), number(minor))
            found[index] = found[uuid] = Gpu(name, number(memory), number(free), driver, version)
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return [gpu for key, gpu in found.items() if key.isdigit()]
    chosen = []
    for key in (part.strip() for part in visible.split(",")):
        if key not in found:
            break  # as CUDA does: what follows an unknown entry is hidden
        chosen.append(found[key])
    return chosen


def number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def cuda_version() -> tuple[int, int]:
    """The CUDA version that the installed torch was built for, read from the packages beside it; (0, 0): none."""
    for package in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        try:
            major, minor = importlib.metadata.version(package).split(".")[:2]
        except importlib.metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return (0, 0)
