"""What a container or a job may use of this machine: the limits of its control groups, version 1 and 2."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from finetune.machine.container import ROOT

# file of version 2, and of version 1 below the folder of its controller
MEMORY = ("memory.max", ("memory", "memory.limit_in_bytes"))
PIDS = ("pids.max", ("pids", "pids.max"))
PIDS_NOW = ("pids.current", ("pids", "pids.current"))
CPU = ("cpu.max", ("cpu", "cpu.cfs_quota_us"))
NO_LIMIT = 2**60  # version 1 writes the largest number of pages where there is none


def memory(root: Path = ROOT) -> int | None:
    """Bytes that the processes of this container or job may hold together; None: no limit but the machine's own."""
    return min((number for number in _numbers(MEMORY, root) if number < NO_LIMIT), default=None)


def pids(root: Path = ROOT) -> int | None:
    """Processes and threads that may still be started; None: no limit."""
    counts = zip(_numbers(PIDS, root, -1), _numbers(PIDS_NOW, root, -1), strict=False)
    return min((most - now for most, now in counts if 0 <= most < NO_LIMIT), default=None)


def cpus(root: Path = ROOT) -> int | None:
    """CPUs that may compute at once, rounded up to whole ones; None: no limit, so all that the process may run on."""
    found = []
    for place in _places(CPU, root):
        words = _read(place).split()
        if place.name == "cpu.cfs_quota_us":
            words.append(_read(place.with_name("cpu.cfs_period_us")))
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            found.append(max(1, math.ceil(int(words[0]) / int(words[1]))))
    quota = min(found, default=None)
    return quota if quota is not None and quota < len(os.sched_getaffinity(0)) else None


def _numbers(names: tuple[str, tuple[str, str]], root: Path, none: int = NO_LIMIT) -> Iterator[int]:
    """The number in each of the files; `none` where it is a word (max)."""
    for place in _places(names, root):
        text = _read(place)
        yield int(text) if text.isdigit() else none


def _places(names: tuple[str, tuple[str, str]], root: Path) -> Iterator[Path]:
    """The files that hold a limit for this process: of its own group, and of each group above it.

    A container sees its own group as the root, or does not see the group that /proc/self/cgroup names; then only the root is there.
    """
    new, (controller, old) = names
    mounted = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            base, name = mounted, new
        elif controller in controllers.split(","):
            base = next((mounted / part for part in (controllers, controller) if (mounted / part).is_dir()), mounted)
            name = old
        else:
            continue
        inner = base / group.lstrip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(base):
                break
            if (folder / name).is_file():
                yield folder / name


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
