"""The self-test: does everything work that a run will use? One line for each test; all run, also after one has failed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from finetune import files
from finetune.errors import MachineError, Refusal, first_line
from finetune.machine import container, cuda, limits, memory, preflight
from finetune.machine.gpus import cuda_version, gpus
from finetune.settings import Settings

WRITTEN = 2**28  # bytes, for the speed of the disk
SLOW_DISK = 50  # MB/s
PATIENCE = 120  # seconds for one test
# what drivers and libraries say, and what to do about it
REMEDIES = (
    (
        r"no kernel image|ptxas|is not compatible with the current PyTorch|not defined for option|unsupported .*arch|sm_\d+",
        "the libraries hold no code for this GPU's generation: take a newer image (for a GPU of before 2018: another GPU); the line "
        "of `libraries` says for which they do",
    ),
    (r"out of memory", "another program holds the GPU's memory, and nvidia-smi lists it; end it, or take another GPU"),
    (
        r"ECC|illegal memory|unspecified launch|misaligned",
        "the card may be faulty: dmesg names it (Xid); take another machine",
    ),
    (r"Failed to find C compiler|Python\.h|\bgcc\b|\bcc1?\b:", "install gcc and python3-dev, or give CC=/usr/bin/gcc"),
    (
        r"failed to map segment|Operation not permitted",
        "TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR have to allow programs (not noexec)",
    ),
    (r"No space left", "make room on the disk, or give the caches another place: XDG_CACHE_HOME"),
    (
        r"cannot open shared object",
        "a CUDA library is missing or of another version: install the packages again (make image)",
    ),
    (r"NCCL", "NCCL_DEBUG=INFO says more; often docker run --shm-size 2g, or NCCL_P2P_DISABLE=1, is enough"),
    (
        r"driver version is insufficient",
        "the driver is older than this build's CUDA: use a newer one, or the image for CUDA 12.8",
    ),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one test found. words: what is there, or what failed and the remedy. good: None: not tested."""

    name: str
    good: bool | None
    words: str
    seconds: float = 0.0

    def line(self) -> str:
        mark = {True: "ok", False: "FAILED", None: "not tested"}[self.good]
        return f"{mark:10}  {self.name:14} {self.seconds:5.1f} s  {self.words}"


Test = Callable[[], str]


def results(tests: Mapping[str, Test]) -> Iterator[Result]:
    """The result of each test, as it ends. Whatever a test raises is its failure."""
    for name, test in tests.items():
        began = time.perf_counter()
        try:
            good, words = True, test()
        except Refusal as refusal:
            good, words = False, " ".join(refusal.problems)
        except Exception as error:  # a driver or a library may raise anything
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            last = (
                f" … {lines[-1][:200]}" if len(lines) > 1 else ""
            )  # a compiler shows the place first, and the reason last
            good, words = False, f"{type(error).__name__}: {first_line(error)}{last}"
        yield Result(name, good, words, time.perf_counter() - began)


def host(settings: Settings, environ: Mapping[str, str]) -> dict[str, Test]:
    """The tests that need no GPU and no torch."""

    def driver() -> str:
        if not visible:
            raise MachineError(
                "no GPU is visible: nvidia-smi lists none, and CUDA finds none. "
                f"With a GPU: {container.command(environ)}. Without: ENGINE=transformers tests the rest."
            )
        _refuse(preflight.gpu_problems(settings, visible, None, environ))
        return ", ".join(f"{gpu.name} ({gpu.memory / 1024:.0f} GiB, {_dotted(gpu.capability)})" for gpu in visible) + (
            f", driver {visible[0].driver}"
        )

    def cuda_starts() -> str:
        _refuse(cuda.problems(visible, environ))
        return f"cuInit; {cuda.ask().count} GPU in use; this build is for CUDA {_dotted(cuda_version())}"

    def compiler() -> str:
        _refuse(preflight.compiler(visible, environ))
        return shutil.which("gcc", path=environ.get("PATH")) or environ.get("CC", "clang")

    visible = cuda.visible(environ)
    on_gpu: dict[str, Test] = {} if not visible and settings.engine == "transformers" else {"driver": driver}
    if visible:
        on_gpu |= {"CUDA": cuda_starts, "compiler": compiler}
    return {
        **on_gpu,
        "memory": lambda: _memory(settings, bool(visible)),
        "processors": lambda: f"{limits.cpus() or len(os.sched_getaffinity(0))} CPUs may compute at once",
        "disk": lambda: _disk(Path(settings.output_dir)),
    }


def _refuse(problems: Iterable[str]) -> None:
    if found := list(problems):
        raise MachineError(*found)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _memory(settings: Settings, gpu: bool) -> str:
    _refuse([*memory.too_small(settings, None, gpu), *preflight.tasks(gpu)])
    shared = shutil.disk_usage("/dev/shm").free
    return f"{memory.available_gib():.0f} GiB for this run, {shared / 2**20:,.0f} MiB of /dev/shm"


def _disk(output: Path) -> str:
    """Write and read back as much as one shard's worth of blocks, where the results will go."""
    place = files.existing(output)
    block = os.urandom(2**22)
    try:
        with tempfile.TemporaryFile(dir=place) as stream:
            began = time.perf_counter()
            for _ in range(WRITTEN // len(block)):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
            speed = WRITTEN / 1e6 / (time.perf_counter() - began)
            stream.seek(0)
            if any(stream.read(len(block)) != block for _ in range(WRITTEN // len(block))):
                raise MachineError(f"{place}: what is read is not what was written; take another disk")
    except OSError as error:
        raise MachineError(
            f"{place}: cannot be written ({error.strerror}); {container.owner(os.environ, output)}"
        ) from None
    slow = f" (slow: 16 GB of weights take {16e3 / speed / 60:.0f} minutes)" if speed < SLOW_DISK else ""
    return f"{place}: {speed:,.0f} MB/s{slow}, {shutil.disk_usage(place).free / 2**30:.0f} GiB free"


def with_torch(module: str, environ: Mapping[str, str], before: list[Result]) -> Iterator[Result]:
    """The tests of `module`, which need torch, in a process of its own. before: the results of `host`."""
    cards = _cards(environ)
    on_gpu = ("GPU memory", "Triton", "attention", *(("NCCL",) if len(cards) > 1 else ()))
    names = ["libraries", "products", "GPU memory", "Triton", "bitsandbytes", "attention", "model", "NCCL"]
    waits = next((r.name for r in before if r.name in ("driver", "CUDA") and r.good is False), None)
    if waits:
        yield from (Result(name, None, f"needs {waits}, which failed") for name in names[:-1])
        return
    gpu = any(result.name == "CUDA" for result in before)
    left = [name for name in names if (gpu and name in on_gpu) or name not in (*on_gpu, "NCCL")]
    while left:
        told_of = {**environ, "SELFTEST_GPU": "1" * gpu, "SELFTEST_CARDS": ",".join(cards[:2])}
        for result in _in_child(module, tuple(left), told_of):
            left.remove(result.name)
            yield result if result.good else dataclasses.replace(result, words=told(result.words))


def _in_child(module: str, names: tuple[str, ...], environ: Mapping[str, str]) -> Iterator[Result]:
    """The results of a process that runs these tests, up to the first at which it ends or hangs: that one has failed."""
    path = os.pathsep.join(filter(None, (str(container.PROGRAM), environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-m", module, *names],
            env={**environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        assert child.stdout is not None
        try:
            for name in names:
                timer = threading.Timer(PATIENCE, child.kill)
                timer.start()
                line = child.stdout.readline()
                timer.cancel()
                if not line:
                    code, seconds = child.wait(), time.perf_counter() - began
                    late = code == -signal.SIGKILL and seconds >= PATIENCE
                    yield Result(name, False, f"no end within {PATIENCE} s" if late else _end(code, errors), seconds)
                    return
                yield Result(**json.loads(line))
                began = time.perf_counter()
        finally:
            child.kill()
            child.wait()


def _end(code: int, errors: IO[bytes]) -> str:
    """Why a process ended in the middle of a test: its last words, or the signal."""
    if code == -signal.SIGKILL:
        return "the process was killed, most often because the host has too little memory: end other programs, or raise the limit"
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    last = lines[-1][:300] if lines else signal.strsignal(-code) if code < 0 else "without a word"
    return f"the process ended: {last}"


def told(words: str) -> str:
    """What failed, with the remedy for what a driver or a library says."""
    remedy = next((remedy for pattern, remedy in REMEDIES if re.search(pattern, words, re.IGNORECASE)), None)
    return f"{words}. Remedy: {remedy}" if remedy else words


def _cards(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that this process was given, before the program chose the first: as numbers or names for CUDA."""
    try:
        began = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        began = []
    given = next(
        (line.partition(b"=")[2].decode() for line in began if line.startswith(b"CUDA_VISIBLE_DEVICES=")), None
    )
    asked = {name: value for name, value in environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if given is not None:
        asked["CUDA_VISIBLE_DEVICES"] = given
    names = given.split(",") if given is not None else map(str, range(1000))
    return [name for name, _ in zip(names, gpus(asked), strict=False)]
