"""What the machine can do, found out before anything is downloaded. No torch: the answer is there in tenths of a second."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import MachineError, SettingsError
from finetune.settings import Settings

CPU_PARAMETERS = 500_000_000  # ENGINE=auto trains nothing larger without a GPU: 135M already makes 45 tokens/s
DRIVERS = {13: 580, 12: 525}  # oldest driver for each CUDA major version (12.x by minor-version compatibility)
OLDEST_CAPABILITY = (7, 5)  # the torch wheels hold kernels for sm_75 to sm_120
INDEX = "model.safetensors.index.json"
DOCKER_RUN = 'docker run --gpus all -v "$PWD/outputs:/outputs" IMAGE'


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
            version = (_number(major), _number(minor))
            found[index] = found[uuid] = Gpu(name, _number(memory), _number(free), driver, version)
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return [gpu for key, gpu in found.items() if key.isdigit()]
    chosen = []
    for key in (part.strip() for part in visible.split(",")):
        if key not in found:
            break  # as CUDA does: what follows an unknown entry is hidden
        chosen.append(found[key])
    return chosen


def _number(text: str) -> int:
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


def parameters(model_name: str) -> int | None:
    """Parameters of a model folder, counted in its safetensors headers, or as a Hub name states them; None: unknown.

    Raises MachineError where one of the folder's files is damaged or closed.
    """
    folder = Path(model_name)
    if folder.is_dir():
        try:
            # and no others: consolidated.safetensors are the same weights once more
            names = [name for name in weight_files(folder) if name.endswith(".safetensors")]
        except SettingsError:
            return None
        headers = [safetensors_header(folder / name, whole=True) for name in names]
        return sum(math.prod(tensor["shape"]) for header in headers for tensor in header.values()) or None
    stated = re.findall(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BbMm])(?![A-Za-z0-9])", model_name.rpartition("/")[2])
    if not stated:
        return None
    number, unit = stated[-1]
    return int(float(number) * (1e9 if unit in "Bb" else 1e6))


def weight_files(folder: Path) -> list[str]:
    """Names of a model folder's weight files. Raises SettingsError where there are none, or the index names an absent one.

    Of several forms it is the one that transformers loads: what is trained and what is merged into must be the same weights.
    """
    for first in ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"):
        if not (folder / first).is_file():
            continue
        if not first.endswith(".index.json"):
            return [first]
        try:
            names = sorted(set(json.loads((folder / first).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SettingsError(
                f"MODEL_NAME={folder}: {first} is no list of weight files; download or copy the model again"
            ) from None
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise SettingsError(f"MODEL_NAME={folder}: lacks {', '.join(missing)}; download or copy the model again")
        return names
    raise SettingsError(f"MODEL_NAME={folder}: has no model.safetensors and no index of one")


def safetensors_header(file: Path, *, whole: bool = False) -> dict[str, dict[str, Any]]:
    """dtype, shape and data_offsets of each tensor in a safetensors file.

    whole: the tensors must be there too. Raises MachineError where the file is damaged or closed.
    """
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            if not 1 < length <= size:
                raise ValueError
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            counts, end = [math.prod(entry["shape"]) for entry in tensors.values()], 8 + length + data_bytes(tensors)
            if min(counts, default=0) < 0 or (whole and end != size):
                raise ValueError
            return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        problem = denied(file) or f"{file}: not a whole safetensors file; download or copy the model again"
        raise MachineError(problem) from None


def data_bytes(header: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes of the tensors in a safetensors file with this header; they fill it from offset 0 without holes."""
    return max((entry["data_offsets"][1] for entry in header.values()), default=0)


def check(
    settings: Settings, visible: list[Gpu], environ: Mapping[str, str], *, missing: Iterable[str] = (), count: int | None = None
) -> list[str]:  # fmt: skip
    """Lines that tell what was found. Raises MachineError with every problem and its remedy.

    missing: what is wrong with files that settings name, in sentences; with them it is a SettingsError. count: parameters of the
    model, where they are known better than from its name.
    """
    temporary()
    if closed := list(_closed(settings)):
        raise MachineError(*closed)  # nothing more can be said of a model that cannot be read
    missing, damaged = list(missing), list[str]()
    try:
        count = count or parameters(settings.model_name)
    except MachineError as error:
        damaged = [*error.problems]
    problems = [
        *missing,
        *damaged,
        *_gpu(settings, visible, count),
        *_compiler(visible, environ),
        *_output(settings),
        *_disk(settings, environ, count),
    ]
    if problems:
        raise (SettingsError if missing else MachineError)(*problems)
    lines = [f"GPU: {g.name}, {g.memory / 1024:.0f} GiB, driver {g.driver}" for g in visible] or ["GPU: none visible"]
    if len(visible) > 1:
        lines.append("GPU: only the first is used; CUDA_VISIBLE_DEVICES chooses another")
    if count:
        lines.append(f"model: {settings.model_name}, {_billions(count)} parameters")
    free = shutil.disk_usage(_existing(Path(settings.output_dir))).free
    return [*lines, f"OUTPUT_DIR: {settings.output_dir}, {free / 2**30:.0f} GiB free"]


def temporary() -> str:
    """The folder for temporary files. Raises MachineError where there is none: tokenizing and compiling need one."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        raise MachineError(
            f"TMPDIR={os.environ.get('TMPDIR', '')}: no folder for temporary files can be written, neither there nor in /tmp. "
            "Give one, for example TMPDIR=/outputs, or with docker run --read-only add --tmpfs /tmp:exec"
        ) from None


def _closed(settings: Settings) -> Iterator[str]:
    """A sentence for each local path that a setting names and this user may not read; for a folder, each file in it."""
    for name in filter(None, (settings.model_name, settings.dataset_name, settings.prompt_template)):
        path = Path(name).expanduser()
        if problem := denied(path):
            yield problem
        elif os.path.isdir(path):
            yield from filter(None, map(denied, sorted(path.iterdir())))


def denied(path: Path) -> str | None:
    """The sentence for a file or folder that is there and this user may not read; None for every other."""
    try:
        needed = os.R_OK | (os.X_OK if stat.S_ISDIR(path.stat().st_mode) else 0)
        if os.access(path, needed):
            return None
    except PermissionError:
        pass
    except OSError:
        return None  # not there: whoever opens it says so
    real = path.resolve()
    culprit = next((folder for folder in reversed(real.parents) if not os.access(folder, os.X_OK)), real)
    status = culprit.stat()
    return (
        f"{path}: cannot be read by user {os.getuid()}, since {culprit} belongs to user {status.st_uid} with mode "
        f"{stat.S_IMODE(status.st_mode):04o}. Open it to all (chmod -R a+rX {culprit}), or run as its owner "
        f"(docker run --user {status.st_uid}:{status.st_gid})."
    )


def _gpu(settings: Settings, visible: list[Gpu], count: int | None) -> Iterator[str]:
    if not visible:
        if settings.engine == "unsloth":
            yield f"No GPU is visible, and ENGINE=unsloth needs one. With a GPU: {DOCKER_RUN}. Without: ENGINE=transformers."
        elif settings.engine == "auto" and count is not None and count > CPU_PARAMETERS:
            yield (
                f"No GPU is visible, and {settings.model_name} with {_billions(count)} parameters is too large for a CPU. "
                f"With a GPU: {DOCKER_RUN} (nvidia-smi must list it). "
                "Without: `make smoke` trains a small model; ENGINE=transformers trains this one on the CPU, for days."
            )
        return
    gpu, cuda = visible[0], cuda_version()
    needed = DRIVERS.get(cuda[0], 0)
    if 0 < _number(gpu.driver.partition(".")[0]) < needed:
        other = (
            ", the image for CUDA 12.8 (make image CUDA=12.8), or `make train` without Docker, which installs the packages for "
            "CUDA 12.8 by itself where it finds an old driver"
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


def _compiler(visible: list[Gpu], environ: Mapping[str, str]) -> Iterator[str]:
    """Triton compiles the launchers of its kernels at run time, and fails in the middle of the first update without these."""
    if not visible:
        return
    path = environ.get("PATH", os.defpath)
    if not any(shutil.which(name, path=path) for name in (environ.get("CC", ""), "gcc", "clang") if name):
        yield "No C compiler is found, and GPU kernels need one. Install it (apt-get install gcc), or give its path, for example CC=/usr/bin/gcc."
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        yield (
            f"{header} is missing, and GPU kernels are compiled with it. Install it (apt-get install python3-dev), or use a "
            "Python that has it: `make train PYTHON=…`, or one that uv brings."
        )


def _output(settings: Settings) -> Iterator[str]:
    folder = Path(settings.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield (
            f"OUTPUT_DIR={folder}: cannot be written ({error.strerror}). Give a folder that user {os.getuid()} may write, "
            f"for example OUTPUT_DIR=/tmp/outputs, or with Docker --user $(id -u):$(id -g) and a volume you own."
        )


def _disk(settings: Settings, environ: Mapping[str, str], count: int | None) -> Iterator[str]:
    """Sentences where the disk cannot hold what will be written: 16-bit weights are 2 bytes a parameter."""
    if count is None:
        return
    need: dict[int, tuple[Path, int]] = {}

    def add(folder: Path, size: int) -> None:
        existing = _existing(folder)
        device = existing.stat().st_dev
        place, before = need.get(device, (existing, 0))
        need[device] = (place, before + size)

    if settings.save_merged:
        add(Path(settings.output_dir), 2 * count + 2**29)
    if not Path(settings.model_name).is_dir():
        cache = _model_cache(settings.model_name, environ)
        if not any(cache.glob("snapshots/*/*.safetensors")):
            add(cache, 2 * count)
    for place, size in need.values():
        free = shutil.disk_usage(place).free
        if free < size:
            yield (
                f"{place}: {free / 1e9:.1f} GB free, about {size / 1e9:.1f} GB needed for the model's 16-bit weights. "
                "Free some, point OUTPUT_DIR or HF_HOME to a larger disk, or set SAVE_MERGED=0."
            )


def _model_cache(name: str, environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps a model."""
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    return Path(environ.get("HF_HUB_CACHE") or Path(home) / "hub") / f"models--{name.replace('/', '--')}"


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"
