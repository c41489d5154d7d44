"""Files in the Hub's cache, each named by the hash of its content. This module checks each content once.

The client checks only the size, so it accepts a file in which a mirror or a disk has flipped a bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetune import files

CHECKED = "finetune-checked.json"  # in the repository's folder of the cache: what was read, and need not be read again


@dataclasses.dataclass(frozen=True)
class Blob:
    """A file of the cache as it was read. named: the hash in its name; found: that of its content, in the same form."""

    sha256: str
    named: str
    found: str


def read(repository: Path, paths: Collection[Path]) -> dict[Path, Blob]:
    """Reads each file below `repository` that was not read before. A file whose name is not a hash is accepted as it is.

    What was read is remembered beside the files, under name, size, time and inode. Where nothing can be written, the
    next run reads again.
    """
    known = _remembered(repository)
    states = {path: _state(path) for path in paths}
    fresh = [path for path in states if known.get(path.name, {}) != {**states[path], "sha256": _sha256(known, path)}]
    with ThreadPoolExecutor() as pool:
        found = dict(zip(fresh, pool.map(_read, fresh), strict=True))
    if new := {
        p.name: {**states[p], "sha256": b.sha256} for p, b in found.items() if _is_hash(p) and b.named == b.found
    }:
        with contextlib.suppress(OSError):
            files.write_json(repository / CHECKED, {**_remembered(repository), **new})
    return {path: found.get(path) or Blob(_sha256(known, path), path.name, path.name) for path in states}


def _read(path: Path) -> Blob:
    sha256 = files.sha256(path)
    if not _is_hash(path):
        return Blob(sha256, sha256, sha256)
    if len(path.name) == 64:
        return Blob(sha256, path.name, sha256)
    content = path.read_bytes()  # of a small file, which git holds itself
    plain, git = (_sha1(before + content) for before in (b"", b"blob %d\0" % len(content)))
    # mirrors that store whole files name them by the plain hash
    return Blob(sha256, path.name, plain if plain == path.name else git)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _is_hash(path: Path) -> bool:
    return re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", path.name) is not None


def _state(path: Path) -> dict[str, int]:
    found = path.stat()
    return dict(size=found.st_size, mtime_ns=found.st_mtime_ns, inode=found.st_ino)


def _sha256(known: dict[str, dict[str, Any]], path: Path) -> str:
    return str(known.get(path.name, {}).get("sha256", ""))


def _remembered(repository: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads((repository / CHECKED).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {n: v for n, v in entries if isinstance(v, dict) and re.fullmatch("[0-9a-f]{64}", str(v.get("sha256")))}
