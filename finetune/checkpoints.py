"""Checkpoints as they lie on the disk: the trainer writes them whole or not at all, each with the hashes of its files."""

from __future__ import annotations

import json
from pathlib import Path

from finetune import files


def folders(folder: Path) -> list[Path]:
    """Checkpoints with their final name, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose files have the sha256 they were written with; a damaged one is named and passed over."""
    for path in reversed(folders(folder)):
        try:
            expected = json.loads((path / "sha256.json").read_bytes())
        except (OSError, ValueError):
            print(f"{path}: has no readable list of hashes; the checkpoint before it is used", flush=True)
            continue
        found = files.digests(path, [name for name in expected if (path / name).is_file()])
        damaged = sorted(name for name in expected if found.get(name) != expected[name])
        if not damaged:
            return path
        print(f"{path}: damaged or missing: {', '.join(damaged)}; the checkpoint before it is used", flush=True)
    return None


def is_last(checkpoint: Path) -> bool:
    """Whether all updates of the run are in the checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    return bool(state["global_step"] >= state["max_steps"])
