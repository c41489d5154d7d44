"""Checkpoints as they lie on the disk: the trainer writes them whole or not at all, each with the hashes of its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from finetune import files

BEST = "best.json"  # in a checkpoint: the name of the best one until then


def folders(folder: Path) -> list[Path]:
    """Checkpoints with their final name, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose files have the sha256 they were written with. A damaged one is named and removed.

    Its update needs the name to be saved again. And as the newer one it would outlive checkpoints that are whole.
    """
    files.remove(folder / "partial")  # a kill may have left it
    for path in reversed(folders(folder)):
        if (problem := _problem(path)) is None:
            return path
        print(f"{path}: {problem}; it is removed, and the checkpoint before it is used", flush=True)
        files.remove(path)
    return None


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None: nothing."""
    try:
        expected = dict[str, str](json.loads((checkpoint / "sha256.json").read_bytes()))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, RecursionError):
        expected = {}
    if not expected:
        return "has no readable list of hashes"
    found = files.digests(checkpoint, [name for name in expected if (checkpoint / name).is_file()])
    if damaged := sorted(name for name in expected if found.get(name) != expected[name]):
        return f"damaged or missing: {', '.join(damaged)}"
    best = best_of(checkpoint)
    if best is not None and best != checkpoint and (problem := _problem(best)):
        return f"needs {best.name}, the best until then, which {problem}"
    return None


def best_of(checkpoint: Path) -> Path | None:
    """The checkpoint whose adapter had the lowest loss when this one was made; None: it was not asked for."""
    place = checkpoint / BEST
    return checkpoint.with_name(json.loads(place.read_bytes())) if place.is_file() else None


def problems(folder: Path) -> Iterator[str]:
    """A sentence for each file of the checkpoints that is damaged or missing, or that the run did not write."""
    for path in folders(folder):
        if problem := _problem(path):
            yield f"{path}: {problem}"
            continue
        expected = {"sha256.json", *json.loads((path / "sha256.json").read_bytes())}
        yield from (f"{path / name}: is not of this run" for name in files.below(path) if name not in expected)
    of_run = {"identity.json", "partial", *(path.name for path in folders(folder))}
    yield from (f"{path}: is not of this run" for path in sorted(folder.glob("*")) if path.name not in of_run)


def is_last(checkpoint: Path) -> bool:
    """Whether all updates of the run are in the checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    return bool(state["global_step"] >= state["max_steps"])
