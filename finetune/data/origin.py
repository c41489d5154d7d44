"""What rows are read from: files of this machine, or a split on the Hub; and which of its rows DATASET_SPLIT takes."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from finetune import sources
from finetune.data import formats, locate, reading
from finetune.data.opened import File
from finetune.data.reading import Read
from finetune.errors import SettingsError
from finetune.files import sha256
from finetune.settings import SPLIT, Settings

BATCH = 1000  # rows of the Hub that are Python objects at a time


@dataclasses.dataclass(frozen=True)
class Source:
    """What rows are read from. names: of its files, for messages. content: what tells it from others. read(n, after): file n's rows after those.

    total: rows of all files; None: it is found out by reading. size: bytes on the disk.
    """

    commit: str | None
    names: list[str]
    content: Any
    read: Callable[[int, int], Iterator[Read]]
    total: int | None
    size: int


def of_files(settings: Settings) -> Source:
    """The rows of the files that DATASET_NAME names."""
    notes: list[str] = []
    found, wanted = locate.files(settings, notes), formats.wanted(settings)
    for note in notes:
        print(f"data: {note}", flush=True)

    def read(number: int, after: int) -> Iterator[Read]:
        return reading.rows(found[number], wanted, after)

    content = [(_sum(file), file.kind, file.member) for file in found]
    size = sum(file.path.stat().st_size for file in found)
    return Source(None, [file.shown for file in found], content, read, None, size)


def _sum(file: File) -> str:
    try:
        return sha256(file.path)
    except OSError as error:
        raise SettingsError(f"DATASET_NAME={file.shown}: cannot be read ({error.strerror})") from None


def of_hub(settings: Settings) -> Source:
    """The rows of a split on the Hub."""
    name, split = settings.dataset_name, locate.split_of(settings)
    commit, found = sources.hub().dataset(settings, split)
    names = found.column_names
    # others may hold pictures, or values that Python cannot. If none is wanted, keep one: without columns there are no rows
    used = found.select_columns([column for column in names if column in formats.wanted(settings)] or names[:1])

    def read(_: int, after: int) -> Iterator[Read]:
        number = after
        while number < len(used):
            batch = used[number : number + BATCH]
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield Read(number, 0, {**dict.fromkeys(names), **dict(zip(batch, values, strict=True))})

    here = [(file["filename"], _stamp(file["filename"])) for file in found.cache_files]
    content = [name, commit or here, settings.dataset_config, split, found._fingerprint if not (commit or here) else ""]
    return Source(commit, [f"{name} {split}"], content, read, len(found), int(found.data.nbytes))


def _stamp(path: str) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def bounds(settings: Settings, source: Source) -> tuple[int, int | None]:
    """The first row that the slice of DATASET_SPLIT takes, and the one after the last; None: the end.

    Rows are only counted where a bound is a share of them, or counted from the end.
    """
    parsed = re.fullmatch(SPLIT, settings.dataset_split)
    assert parsed is not None  # checked by settings
    start, stop = parsed["start"], parsed["stop"]
    if all(bound is None or bound.isdecimal() for bound in (start, stop)):
        return int(start or 0), None if stop is None else max(int(start or 0), int(stop))
    count = source.total
    if count is None:
        count = sum(1 for number in range(len(source.names)) for _ in source.read(number, 0))

    def bound(text: str | None) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)

    taken = range(*slice(bound(start), bound(stop)).indices(count))
    return taken.start, max(taken.start, taken.stop)
