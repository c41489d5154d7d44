"""What this user may read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from finetune.settings import Settings


def closed(settings: Settings) -> Iterator[str]:
    """A sentence for each local path that a setting names and this user may not read; for a folder, each file in it."""
    named = (settings.model_name, settings.dataset_name, settings.eval_dataset_name, settings.template_file)
    for name in filter(None, named):
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
