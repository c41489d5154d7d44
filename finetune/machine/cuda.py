"""Whether CUDA works, asked of the driver itself: nvidia-smi also lists GPUs on which nothing can be computed. No torch."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.machine import container
from finetune.machine.gpus import Gpu, gpus

LIBRARY = "libcuda.so.1"
PATIENCE = 60.0  # seconds; a box of eight GPUs whose driver has to be loaded first takes about 10
SLOW = -1  # as a code: no answer within PATIENCE
ABSENT = -2  # there is no library
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, <cuda.h>


@dataclasses.dataclass(frozen=True)
class Answer:
    """What cuInit and cuDeviceGetCount said. code: a CUresult, 0 where all is well; words: its name, and what it means."""

    code: int
    words: str
    count: int = 0


def ask() -> Answer:
    """Start CUDA in this process, with the GPUs that CUDA_VISIBLE_DEVICES leaves; torch finds it started."""
    return _ask(LIBRARY)


@functools.cache
def _ask(name: str) -> Answer:
    found: list[Answer] = []
    # a driver that hangs shall be told: the thread is left behind, and ends with the process
    thread = threading.Thread(target=lambda: found.append(_start(name)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found[0] if found else Answer(SLOW, f"no answer within {PATIENCE:.0f} s")


def _start(name: str) -> Answer:
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        return Answer(ABSENT, str(error))
    count = ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return Answer(code, "" if code == 0 else _named(driver, code), count.value)


def _named(driver: Any, code: int) -> str:
    said = []
    for function in (driver.cuGetErrorName, driver.cuGetErrorString):
        text = ctypes.c_char_p()
        if function(code, ctypes.byref(text)) == 0 and text.value:
            said.append(text.value.decode(errors="replace"))
    return ": ".join(said) or f"error {code}"


def devices() -> list[Gpu]:
    """The GPUs as CUDA sees them, for where nvidia-smi is absent or does not know a name (a MIG slice); empty where CUDA fails.

    All of a GPU's memory counts as free: only a context could tell more.
    """
    if ask().count == 0:
        return []
    driver, made = ctypes.CDLL(LIBRARY), []
    for index in range(ask().count):
        device, name, total = ctypes.c_int(), ctypes.create_string_buffer(100), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
        for attribute, value in ((MAJOR, major), (MINOR, minor)):
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        memory = total.value // 2**20
        made.append(Gpu(name.value.decode(errors="replace"), memory, memory, _driver(), (major.value, minor.value)))
    return made


def _driver() -> str:
    """The driver's version, by the kernel's word."""
    try:
        text = (container.ROOT / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found[0] if found else ""


def problems(visible: list[Gpu], environ: Mapping[str, str], root: Path = container.ROOT) -> Iterator[str]:
    """The sentence for GPUs that are listed and cannot compute."""
    if not visible or ((answer := ask()).code == 0 and answer.count):
        return
    said = f"CUDA does not start ({answer.words})" if answer.code else "CUDA finds no GPU"
    yield f"{visible[0].name} is listed by nvidia-smi, and {said}. {' '.join(_remedies(answer, environ, root))}"


def _remedies(answer: Answer, environ: Mapping[str, str], root: Path) -> Iterator[str]:
    here = container.kind(environ, root)
    given = environ.get("NVIDIA_DRIVER_CAPABILITIES")
    lacking = given is not None and not {"all", "compute"} & set(given.replace(" ", "").split(","))
    if lacking:
        yield f"NVIDIA_DRIVER_CAPABILITIES={given} lacks compute: set NVIDIA_DRIVER_CAPABILITIES=compute,utility."
    uvm = (root / "dev/nvidia-uvm").exists()
    if not uvm:
        yield (
            "The device file /dev/nvidia-uvm is missing, and CUDA needs it: run `nvidia-modprobe -u -c 0` on the host as root"
            f"{', and start the container again' if here else ''}."
        )
    if answer.code == 802:
        yield "The links between the GPUs are not ready: start nvidia-fabricmanager on the host, with the driver's version."
    if answer.code == 803:
        yield (
            "The driver's library has another version than the kernel's module: reboot the host after a driver update"
            f"{', and start the container again' if here else ''}."
        )
    if answer.code == SLOW:
        yield "The driver hangs: `dmesg` on the host names the GPU (Xid); reset it, or reboot the host."
    yield from _way_in(answer, environ, root, whole=uvm and not lacking)


def _way_in(answer: Answer, environ: Mapping[str, str], root: Path, whole: bool) -> Iterator[str]:
    """How this kind of container gets a GPU. whole: nothing was seen to lack."""
    here = container.kind(environ, root)
    if here == "podman":
        yield (
            "With podman: `sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml` on the host, then "
            f"{container.command(environ, root=root)}."
        )
    elif here == "kubernetes":
        yield (
            "In Kubernetes the NVIDIA device plugin gives a pod its GPU: resources.limits nvidia.com/gpu: 1, and "
            "runtimeClassName: nvidia where the cluster has that class."
        )
    elif here == "docker" and (answer.code == ABSENT or not whole):
        yield (
            "With Docker: install nvidia-container-toolkit on the host, `sudo nvidia-ctk runtime configure --runtime=docker`, "
            f"restart Docker, then {container.command(environ, root=root)}."
        )
    elif here is None and answer.code == ABSENT:
        yield "Install the driver's CUDA library (on Debian libcuda1, on Ubuntu libnvidia-compute of the driver's version)."
    elif whole and answer.code not in (802, 803, SLOW):
        yield "Another program may hold the GPU, or the driver is not whole: `nvidia-smi` and `dmesg` on the host say more."


def visible(environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that a run may use: as nvidia-smi lists them, or as CUDA sees them where nvidia-smi is not there."""
    return gpus(environ) or devices()
