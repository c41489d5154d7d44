"""What tests fetch from a package index, once and by hash, into a cache that outlives them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def cache() -> Path:
    """The cache's folder, as for scripts/smoke_model.py."""
    place = (
        os.environ.get("FINETUNE_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "finetune"
    )
    return Path(place).absolute()


def packages(lock: str) -> Path:
    """A folder for PYTHONPATH with the wheels of a hash lock below `tests`, without what they depend on."""
    path = ROOT / "tests" / lock
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    place = cache() / f"{path.stem}-3.{sys.version_info[1]}-{digest[:16]}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            uv = [str(ROOT / "scripts/bootstrap.sh"), "uv", "pip", "install", "--quiet", "--python", sys.executable]
            made = ["--no-deps", "--no-build", "--require-hashes", "--requirements", str(path)]
            subprocess.run(
                [*uv, *made, "--target", f"{scratch}/made"], check=True, env={**os.environ, "VENV": sys.prefix}
            )
            Path(scratch, "made").rename(place)
    return place
