"""Exit 1 where training hangs, 0 in every other state: what HEALTHCHECK asks every half minute.

The program keeps FINETUNE_STATE_DIR/heartbeat.json, renamed into place whole:
{"phase": "training", "time": 1700000000.0, "timeout": 600.0}

phase: what the run does now (loading, training, saving). time: seconds since 1970 when the phase began or, later, when the
last update ended. timeout: the setting HEALTH_TIMEOUT as the run resolved it; 0 turns the check off. Only the phase "training"
can hang: the others have no updates to count. Standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path


def verdict(environ: Mapping[str, str], now: float) -> tuple[int, str]:
    """(exit code, one line for `docker inspect`)."""
    try:
        beat = json.loads((Path(environ["FINETUNE_STATE_DIR"]) / "heartbeat.json").read_bytes())
    except (KeyError, FileNotFoundError):
        return 0, "no run here yet"
    age = now - beat["time"]
    if beat["phase"] != "training":
        return 0, f"{beat['phase']}, since {age:.0f} s"
    if 0 < beat["timeout"] < age:
        return 1, f"hangs: no update has ended for {age:.0f} s (HEALTH_TIMEOUT={beat['timeout']:g})"
    return 0, f"training: the last update ended {age:.0f} s ago"


if __name__ == "__main__":
    code, line = verdict(os.environ, time.time())
    print(line)
    sys.exit(code)
