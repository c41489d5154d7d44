"""Rows and their tokens on disk, in shards of Arrow: written one by one, whole or not at all, and read without holding them in memory.

Below the cache of `datasets`, so that runs in other folders find them. What is in a store is known by its key; see docs/adr/0302.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console, files
from finetune.errors import MachineError
from finetune.sources.model import read_object

if TYPE_CHECKING:
    from pyarrow import RecordBatch

SHARD_ROWS, SHARD_BYTES = 50_000, 2**28  # a shard ends at the first of both
UNUSED_DAYS = 14  # after which a store is removed, when another is made
SHARE = 0.2  # of the disk that stores may take, before the oldest go
DONE = "done.json"  # in a store: it is whole
WAIT_S = 0.2  # between two looks whether another process is done


def cache() -> Path:
    """The folder of all stores: where `datasets` keeps its own, which is a place for data, and large if one of them is."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser() / "finetune"


@functools.cache
def version() -> str:
    """Of this program's way from a file to tokens: the code of this package."""
    here, found = Path(__file__).parent, hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


class Stored:
    """The rows of shards. Batches are read where they are asked for, each into memory of its own; or mapped."""

    def __init__(self, folder: Path, shards: int, mapped: bool = False):
        import pyarrow

        opened = pyarrow.memory_map if mapped else pyarrow.OSFile
        options = pyarrow.ipc.IpcReadOptions(use_threads=False)  # threads do not live on in forked processes
        self.readers = [pyarrow.ipc.open_file(opened(str(_shard(folder, n))), options=options) for n in range(shards)]
        self.batches = [(reader, index) for reader in self.readers for index in range(reader.num_record_batches)]
        sizes = (read_object(_state(folder, number))["batches"] for number in range(shards))
        self.starts = [0, *itertools.accumulate(itertools.chain.from_iterable(sizes))]  # known without reading

    def __len__(self) -> int:
        return self.starts[-1]

    def batch(self, number: int) -> RecordBatch:
        """One of the batches that were written."""
        reader, index = self.batches[number]
        return reader.get_batch(index)

    def __iter__(self) -> Iterator[RecordBatch]:
        return map(self.batch, range(len(self.batches)))

    def at(self, row: int) -> tuple[int, int]:
        """Which batch holds a row, and where in it."""
        number = bisect.bisect_right(self.starts, row) - 1
        return number, row - self.starts[number]


@dataclasses.dataclass(frozen=True)
class Store:
    """A place for what one key stands for, held by this process alone while it is open.

    done: what was said when it was finished; None: it is not. shards, state: whole shards, and what was said with the last.
    """

    folder: Path
    done: dict[str, Any] | None
    shards: int
    state: dict[str, Any]

    def rows(self, mapped: bool = False) -> Stored:
        """What is in the whole shards."""
        return Stored(self.folder, self.shards, mapped)

    def write(self, batches: Iterator[tuple[RecordBatch, dict[str, Any]]]) -> Store:
        """Add batches, each with what is to be known where the next start goes on after it. Returns the store with them."""
        number, state = self.shards, self.state
        while (first := next(batches, None)) is not None:
            partial = self.folder / f"{os.getpid()}.partial"
            state = _written(partial, itertools.chain([first], batches))
            os.replace(partial, _shard(self.folder, number))
            files.write_json(_state(self.folder, number), state)
            number += 1
        return dataclasses.replace(self, shards=number, state=state)

    def finish(self, said: dict[str, Any]) -> Store:
        """Nothing more comes. said: what a later start is to know without reading."""
        files.write_json(self.folder / DONE, {**said, "shards": self.shards, "sizes": _sizes(self.folder)})
        _clean(self.folder)
        return dataclasses.replace(self, done=said)

    def remove(self) -> None:
        """Forget what was written: it is of no use to a later start."""
        files.remove(self.folder, ignore_errors=True)


@contextlib.contextmanager
def opened(kind: str, key: Mapping[str, Any]) -> Iterator[Store]:
    """The store of a key, for this process alone; another one that wants it waits. kind: begins the folder's name."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    folder = cache() / f"{kind}-{digest[:32]}"
    with locked(folder):
        done = read_object(folder / DONE) or None
        if done and done["sizes"] != _sizes(folder):  # a cleaner of caches or a full disk has been here
            for path in folder.iterdir():
                files.remove(path)
            done = None
        for partial in folder.glob("*.partial"):
            files.remove(partial, ignore_errors=True)
        shards = done["shards"] if done else _whole(folder)
        with contextlib.suppress(PermissionError):  # another user's, who shares the cache
            os.utime(folder)  # used now
        yield Store(folder, done, shards, read_object(_state(folder, shards - 1)))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone; another one that wants it waits."""
    handle = _locked(folder)
    try:
        yield
    finally:
        os.close(handle)


def room(needed: int, what: str) -> None:
    """Raise MachineError where the disk has not so many bytes free."""
    place = files.existing(cache())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise MachineError(
            f"{place}: {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB needed for {what}. Free some, or point "
            "HF_DATASETS_CACHE to a larger disk, for example HF_DATASETS_CACHE=/data/cache. STREAMING=1 keeps no files of a "
            "Hub data set on the disk"
        )


def _locked(folder: Path) -> int:
    """A handle that holds the lock of a folder, which is made. On a file system without locks it goes on without one."""
    told = False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            if not told:
                print("data: another process makes the same tokens; waiting for it", flush=True)
            told = True
            console.beat("loading")
            time.sleep(WAIT_S)
            continue
        except OSError:
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
        os.close(handle)  # it was removed in between


def _written(path: Path, batches: Iterator[tuple[RecordBatch, dict[str, Any]]]) -> dict[str, Any]:
    """Write one shard, on the disk when this returns. Returns what was said with its last batch."""
    import pyarrow

    rows: list[int] = []
    size = 0
    batch, state = next(batches)
    with open(path, "wb") as stream:
        with pyarrow.ipc.new_file(stream, batch.schema) as writer:
            while True:
                writer.write_batch(batch)
                rows, size = [*rows, batch.num_rows], size + batch.nbytes
                if sum(rows) >= SHARD_ROWS or size >= SHARD_BYTES:
                    break
                if (following := next(batches, None)) is None:
                    break
                batch, state = following
        stream.flush()
        os.fsync(stream.fileno())
    return {**state, "batches": rows}


def _whole(folder: Path) -> int:
    """How many shards are whole, from the first on: a shard's state is written after it."""
    return next(n for n in itertools.count() if not (_state(folder, n).is_file() and _shard(folder, n).is_file()))


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.arrow"


def _state(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.json"


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file that holds rows."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix in (".arrow", ".npy")}


def _clean(mine: Path) -> None:
    """Remove stores that nobody uses: for days, or the oldest where all together take too much of the disk. None that is open."""
    with contextlib.suppress(OSError):
        found = sorted(
            (place.stat().st_mtime, place) for place in mine.parent.iterdir() if place.is_dir() and place != mine
        )
        sizes = {place: sum(file.stat().st_size for file in place.iterdir()) for _, place in [*found, (0, mine)]}
        total, limit = sum(sizes.values()), SHARE * shutil.disk_usage(mine).total
        for used, place in found:
            if time.time() - used > UNUSED_DAYS * 86400 or total > limit:
                total -= sizes[place]
                _remove(place)


def _remove(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            files.remove(folder, ignore_errors=True)
    finally:
        os.close(handle)
