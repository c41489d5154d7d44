"""What rows are read from: files of this machine, or a split on the Hub; and which of its rows a slice takes."""

from __future__ import annotations

import dataclasses
import itertools
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
from finetune.settings import Settings
from finetune.sources import local

BATCH = 1000  # rows of the Hub that are Python objects at a time
Placed = tuple[int, Read]  # the number of a file, and a row of it


@dataclasses.dataclass(frozen=True)
class Origin:
    """What rows are read from. names: of its files, for messages. content: what tells it from others. size: bytes on the disk.

    read(n, after): file n's rows after so many. counted(n, most): how many it has, or `most` if it has more.
    """

    commit: str | None
    names: list[str]
    content: Any
    size: int
    read: Callable[[int, int], Iterator[Read]]
    counted: Callable[[int, int | None], int]

    def count(self, most: int | None = None) -> int:
        """How many rows there are, or `most` if there are more."""
        total = 0
        for number in range(len(self.names)):
            total += self.counted(number, None if most is None else most - total)
            if total == most:
                break
        return total

    def rows(self, first: int) -> Iterator[Placed]:
        """The rows from number `first` on, counted from 0. Those before it are counted, at most."""
        for number in range(len(self.names)):
            if first and number < len(self.names) - 1 and (size := self.counted(number, None)) <= first:
                first -= size
                continue
            yield from self.after(number, first)
            return

    def after(self, file: int, row: int) -> Iterator[Placed]:
        """The rows after row number `row`, counted from 1, of a file, and those of the files after it."""
        numbers = range(file, len(self.names))
        return ((number, read) for number in numbers for read in self.read(number, row if number == file else 0))

    def told(self, file: int, number: int, line: int) -> str:
        """Where a row is, in words: "rows.jsonl row 3 (line 4)"."""
        return told(self.names, file, number, line)


def told(names: list[str], file: int, number: int, line: int) -> str:
    """Where a row is, in words."""
    return f"{names[file]} row {number}{f' (line {line})' if line else ''}"


def of(settings: Settings) -> Origin:
    """What DATASET_NAME names. Raises SettingsError where it cannot be."""
    if problem := local.url("DATASET_NAME", settings.dataset_name):
        raise SettingsError(problem)
    if not locate.on_hub(settings.dataset_name):
        if settings.streaming:
            print(f"data: STREAMING=1 has no effect: {settings.dataset_name} is on this machine", flush=True)
        return _of_files(settings)
    return _streamed(settings) if settings.streaming else _of_hub(settings)


def _of_files(settings: Settings) -> Origin:
    notes: list[str] = []
    found, wanted = locate.files(settings, notes), formats.wanted(settings)
    for note in notes:
        print(f"data: {note}", flush=True)
    for file in found:
        if file.sheet:
            print(f"data: {file.shown}: the rows are those of the sheet {file.sheet}", flush=True)

    def read(number: int, after: int) -> Iterator[Read]:
        return reading.rows(found[number], wanted, after)

    return Origin(
        commit=None,
        names=[f"{file.shown} sheet {file.sheet}" if file.sheet else file.shown for file in found],
        content=[(_sum(file), file.kind, file.member) for file in found],
        size=sum(file.path.stat().st_size for file in found),
        read=read,
        counted=lambda number, most: reading.count(found[number], most),
    )


def _sum(file: File) -> str:
    try:
        return sha256(file.path)
    except OSError as error:
        raise SettingsError(f"DATASET_NAME={file.shown}: cannot be read ({error.strerror})") from None


def _of_hub(settings: Settings) -> Origin:
    name, split = settings.dataset_name, locate.split_of(settings)
    commit, found = sources.hub().dataset(settings, split)
    names, wanted = found.column_names, formats.wanted(settings)
    # others may hold pictures, or values that Python cannot. If none is wanted, keep one: without columns there are no rows
    used = found.select_columns([column for column in names if column in wanted] or names[:1])

    def read(_: int, after: int) -> Iterator[Read]:
        number = after
        while number < len(used):
            batch = used[number : number + BATCH]
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield Read(number, 0, {**dict.fromkeys(names), **dict(zip(batch, values, strict=True))})

    here = [(file["filename"], _stamp(file["filename"])) for file in found.cache_files]
    return Origin(
        commit=commit,
        names=[f"{name} {split}"],
        content=[name, commit or here or found._fingerprint, settings.dataset_config, split],
        size=int(found.data.nbytes),
        read=read,
        counted=lambda _, most: len(found) if most is None else min(most, len(found)),
    )


def _streamed(settings: Settings) -> Origin:
    """As `_of_hub`, and known as the same rows, but none of its files is on the disk."""
    name, split, wanted = settings.dataset_name, locate.split_of(settings), formats.wanted(settings)
    found = sources.hub().stream(settings, split)
    slices = [settings.dataset_split, *([settings.eval_split] if settings.eval_split != "auto" else [])]
    if found.total is None and (unknown := next((value for value in slices if re.search(r"%|\[-|:-", value)), None)):
        variable = "DATASET_SPLIT" if unknown == settings.dataset_split else "EVAL_SPLIT"
        raise SettingsError(
            f"{variable}={unknown}: STREAMING=1 needs to know how many rows there are, and the Hub does not say it of {name}; count from "
            f"the beginning, for example {variable}={split}[0:500], or set STREAMING=0"
        )

    def read(_: int, after: int) -> Iterator[Read]:
        return (Read(number, 0, row) for number, row in enumerate(found.rows(after, wanted), after + 1))

    return Origin(
        commit=found.commit,
        names=[f"{name} {split}"],
        content=[name, found.commit, settings.dataset_config, split],
        size=0,  # not known, and not on the disk
        read=read,
        counted=lambda _, most: found.count(most),
    )


def _stamp(path: str) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def taken(split: str, count: int) -> range:
    """The rows that a slice takes out of `count`; bounds beyond the end mean the end."""
    parsed = locate.parsed(split)

    def bound(text: str | None) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)

    found = range(*slice(bound(parsed["start"]), bound(parsed["stop"])).indices(count))
    return range(found.start, max(found.start, found.stop))


def end(split: str) -> int | None:
    """The row after the last that a slice takes, where that does not depend on how many there are; None: it does."""
    start, stop = locate.parsed(split).group("start", "stop")
    return int(stop) if stop and stop.isdecimal() and (start or "0").isdecimal() else None


def chosen(source: Origin, numbers: list[int]) -> list[Placed]:
    """The rows with these numbers, counted from 0, in their order in the files."""
    if not numbers:
        return []
    first, wanted = min(numbers), set(numbers)
    found = itertools.islice(source.rows(first), max(numbers) + 1 - first)
    return [placed for number, placed in enumerate(found, first) if number in wanted]
