"""Machines that are not there: an NVIDIA driver compiled from a few lines of C, and files that a kernel would show."""

from __future__ import annotations

import subprocess
from pathlib import Path

H100 = "0, GPU-aa, NVIDIA H100 80GB HBM3, 81559, 81079, 580.159.04, 9.0"
DRIVER = r"""
#include <string.h>
#include <unistd.h>
int cuInit(unsigned flags) { if (CODE < 0) sleep(600); return CODE; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuGetErrorName(int code, const char **text) { *text = "CUDA_ERROR_OF_A_TEST"; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "a test says so"; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "NVIDIA H100 MIG 1g.10gb", size); return 0; }
int cuDeviceTotalMem_v2(unsigned long *total, int device) { *total = 10ul << 30; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 9 : 0; return 0; }
"""


def driver(folder: Path, code: int = 0, count: int = 1) -> Path:
    """A libcuda.so.1 whose cuInit returns `code` (below 0: not before ten minutes), with `count` devices."""
    library = folder / f"libcuda-{code}-{count}.so.1"
    if not library.is_file():
        words = ["gcc", "-shared", "-fPIC", f"-DCODE={code}", f"-DCOUNT={count}", "-x", "c", "-", "-o", str(library)]
        subprocess.run(words, input=DRIVER, text=True, check=True)
    return library


def smi(folder: Path, *lines: str) -> dict[str, str]:
    """An environment in which nvidia-smi lists these GPUs."""
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n/bin/cat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)}


def root(folder: Path, **files: str) -> Path:
    """A root folder with these files; `__` in a name is a slash, and `_dot_` a dot at its beginning."""
    for name, content in files.items():
        path = folder / name.replace("_dot_", ".").replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder
