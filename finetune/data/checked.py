"""Rows are checked while they are read, and the good ones go into a store, as JSON with their places."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.data import checks, formats, store
from finetune.data.formats import FORMATS, Format
from finetune.data.origin import Source, bounds
from finetune.data.reading import Read, Row, Unread
from finetune.errors import SettingsError, first_line
from finetune.settings import Settings

if TYPE_CHECKING:
    from pyarrow import RecordBatch

SHOWN = 5  # bad rows named in one message
BATCH = 1000  # rows written at a time
Placed = tuple[int, Read]  # the number of a file, and a row of it


class Checked:
    """Reads rows, checks them, and writes the good ones to a store. It goes on where the store ends."""

    def __init__(self, settings: Settings, source: Source, opened: store.Store):
        self.settings, self.source, self.store = settings, source, opened
        state = opened.state
        self.at: tuple[int, int] = tuple(state.get("at", (0, 0)))  # file, and rows of it, that have been seen
        self.seen, self.bad, self.told = state.get("seen", 0), state.get("bad", 0), list(state.get("told", []))
        self.form: type[Format] | None = FORMATS.get(state.get("format", ""))
        self.columns: list[str] = list(state.get("columns", []))  # of the first row
        self.digest, self.good = hashlib.sha256(b"["), 0

    def stored(self) -> store.Store:
        """The store, finished. Raises SettingsError where rows are bad, or none is good."""
        settings = self.settings
        for batch in self.store.rows() if self.store.shards else ():
            for row in batch.to_pylist():
                self._hash(row["json"] if row["sorted"] else _json(json.loads(row["json"])))
        written = self.store.write(self._batches())
        if not self.seen or (self.bad and not settings.drop_bad_rows) or not self.good:
            written.remove()
        if not self.seen:
            raise SettingsError(f"DATASET_NAME={settings.dataset_name}: holds no rows in {settings.dataset_split}")
        refuse(
            self.told,
            self.bad,
            self.seen,
            settings,
            formats.needed(self.form, settings) if self.form else "each is an object",
        )
        if not self.good:
            raise SettingsError(
                f"DATASET_NAME={settings.dataset_name}: all {self.bad} rows are malformed; the first is {self.told[0]}"
            )
        self.digest.update(b"]")
        assert self.form is not None
        return written.finish(
            dict(
                format=self.form.NAME,
                columns=self.columns,
                seen=self.seen,
                bad=self.bad,
                sha256=self.digest.hexdigest(),
            )
        )

    def _batches(self) -> Iterator[tuple[RecordBatch, dict[str, Any]]]:
        import pyarrow

        kept: list[tuple[bytes, bool, int, int, int]] = []
        columns = ("json", "sorted", "file", "number", "line")
        for file, read in self._taken():
            self.seen, self.at = self.seen + 1, (file, read.number)
            if self.form is None and isinstance(read.row, dict):
                self.form, self.columns = formats.choose(read.row, self.settings), [*read.row]
            if good := self._good(file, read):
                kept.append((*good, file, read.number, read.line))
            if len(kept) == BATCH:
                yield (
                    pyarrow.RecordBatch.from_arrays([*map(pyarrow.array, zip(*kept, strict=True))], columns),
                    self._state(),
                )
                kept = []
        if kept:
            yield (
                pyarrow.RecordBatch.from_arrays([*map(pyarrow.array, zip(*kept, strict=True))], columns),
                self._state(),
            )

    def _state(self) -> dict[str, Any]:
        assert self.form is not None
        return dict(
            at=self.at, seen=self.seen, bad=self.bad, told=self.told, format=self.form.NAME, columns=self.columns
        )

    def _good(self, file: int, read: Read) -> tuple[bytes, bool] | None:
        """What is kept of a row as JSON, and whether its names are sorted; None: it is bad, which is noted."""
        row, settings = read.row, self.settings
        problem: str | None
        if not isinstance(row, dict):
            problem = row if isinstance(row, Unread) else f"is {checks.kind(row)}, not an object"
        else:
            assert self.form is not None
            problem = self.form.problem(row, settings)
        if not problem and self.form is not None:
            there = [column for column in self.form.reads(settings) if column in row]
            needs = self.form.needs(settings)
            kept = {column: row[column] for column in there if column in needs or not checks.empty(row[column])}
            try:
                in_order = _json(kept)
                flat = all(isinstance(value, str) for value in kept.values())
                as_read = in_order if flat else json.dumps(kept, ensure_ascii=False).encode()
                self._hash(in_order)
                return as_read, flat
            except (
                TypeError,
                UnicodeEncodeError,
            ) as error:  # Parquet has times and bytes; JSON has halves of characters
                problem = f"cannot be written as JSON ({first_line(error)})"
        self.bad += 1
        if len(self.told) < SHOWN:
            self.told.append(f"{told(self.source.names, file, read.number, read.line)}: {problem}")
        return None

    def _hash(self, row: bytes) -> None:
        """The hash is that of the JSON list of all rows."""
        self.digest.update(b", " + row if self.good else row)
        self.good += 1

    def _taken(self) -> Iterator[Placed]:
        """The rows of the slice, after those that the store has seen."""
        first, stop = bounds(self.settings, self.source)
        left = None if stop is None else max(0, stop - first - self.seen)
        total = self.source.total if stop is None else stop - first
        with console.Counted("rows read", total, self.seen) as progress:
            for placed in itertools.islice(self._from(first), left):
                yield placed
                progress.add(1)

    def _from(self, first: int) -> Iterator[Placed]:
        file, after = self.at
        rows = (
            (n, read)
            for n in range(file, len(self.source.names))
            for read in self.source.read(n, after if n == file else 0)
        )
        return itertools.islice(rows, 0 if self.seen else first, None)


def _json(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, sort_keys=True).encode()


def told(names: list[str], file: int, number: int, line: int) -> str:
    return f"{names[file]} row {number}{f' (line {line})' if line else ''}"


def refuse(told: list[str], bad: int, of: int, settings: Settings, needed: str) -> None:
    """Raise SettingsError that names bad rows, unless DROP_BAD_ROWS is set. told: sentences on the first; of: rows in all; needed: what a row needs."""
    if bad and not settings.drop_bad_rows:
        more = f" (and {bad - SHOWN} more)" if bad > SHOWN else ""
        raise SettingsError(
            *told[:SHOWN],
            f"{bad} of {of} rows are malformed{more}: {needed}. Mend them, or leave them out with DROP_BAD_ROWS=1.",
        )
