"""Whether the last run in OUTPUT_DIR ended without a word. A process that is killed cannot say why; the next one can guess."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from finetune import console
from finetune.machine import limits

NOTE = "running.partial"  # in OUTPUT_DIR while a run lives there, and after one that was killed


@contextlib.contextmanager
def noted(output: Path) -> Iterator[None]:
    """Note in `output`, which this process has for itself, that a run lives; tell where the note of a dead one is found."""
    path = output / NOTE
    if sentence := _killed(path):
        print(sentence, flush=True)
    console.note_in(path)
    try:
        yield
    finally:
        console.note_in(None)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _killed(path: Path) -> str | None:
    try:
        phase = dict(json.loads(path.read_bytes()))["phase"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        phase = "it was starting"
    limit = limits.memory()
    allowed = f", here {limit / 2**30:.1f} GiB" if limit is not None else ""
    return (
        f"note: the last run in {path.parent} was killed while {phase}. Most often memory ran out (exit code 137{allowed}): raise the "
        "limit (docker run --memory, limits.memory in Kubernetes, --mem with Slurm), or set DATASET_NUM_PROC=1. Or it was stopped "
        "and had too little time: docker stop -t 120"
    )
