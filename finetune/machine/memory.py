"""The host's memory that this process has taken."""

from __future__ import annotations

import re
from pathlib import Path


def peak_gib() -> float:
    """The most that this process has held at once, in GiB.

    By /proc: `getrusage` also counts the process that started this one, as it was then.
    """
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) / 2**20 if found else 0.0
