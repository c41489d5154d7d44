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
from finetune.data.origin import Origin, Placed
from finetune.data.reading import Row, Unread
from finetune.errors import SettingsError, first_line
from finetune.settings import Settings

if TYPE_CHECKING:
    from pyarrow import RecordBatch

SHOWN = 5  # bad rows named in one message
BATCH = 1000  # rows written at a time
DUMPS = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode  # json.dumps makes an encoder each time
COLUMNS = ("json", "sorted", "file", "number", "line")


class Checked:
    """Reads the rows `trained` of a source, checks them, and writes the good ones to a store. It goes on where the store ends."""

    def __init__(self, settings: Settings, source: Origin, opened: store.Store, trained: range):
        self.settings, self.source, self.store, self.trained = settings, source, opened, trained
        state = opened.state
        self.at: tuple[int, int] = tuple(state.get("at", (0, 0)))  # file, and rows of it, that have been seen
        self.seen, self.bad, self.told = state.get("seen", 0), state.get("bad", 0), list(state.get("told", []))
        self.form: type[Format] | None = FORMATS.get(state.get("format", ""))
        self.columns: list[str] = list(state.get("columns", []))  # of the first row
        self.digest, self.good = hashlib.sha256(b"["), 0

    def stored(self) -> tuple[store.Store, dict[str, Any]]:
        """The store, with all rows, and what there is to know of them. Raises SettingsError where rows are bad, or none is good."""
        settings = self.settings
        for batch in self.store.rows() if self.store.shards else ():
            for row in batch.to_pylist():
                self._hash(row["json"] if row["sorted"] else _json(json.loads(row["json"])))
        written = self.store.write(self._batches())
        if not self.seen or (self.bad and not settings.drop_bad_rows) or not self.good:
            written.remove()
        if not self.seen:
            raise SettingsError(f"DATASET_NAME={settings.dataset_name}: holds no rows in {settings.dataset_split}")
        form = self.form or formats.choose({}, settings)
        refuse(self.told, self.bad, self.seen, settings, formats.needed(form, settings))
        if not self.good:
            raise SettingsError(
                f"DATASET_NAME={settings.dataset_name}: all {self.bad} rows are malformed; the first is {self.told[0]}"
            )
        self.digest.update(b"]")
        return written, dict(
            format=form.NAME, columns=self.columns, seen=self.seen, bad=self.bad, sha256=self.digest.hexdigest()
        )

    def _batches(self) -> Iterator[tuple[RecordBatch, dict[str, Any]]]:
        good: list[tuple[bytes, bool, int, int, int]] = []
        for file, read in self._taken():
            self.seen, self.at = self.seen + 1, (file, read.number)
            if self.form is None and isinstance(read.row, dict):
                self.form, self.columns = formats.choose(read.row, self.settings), [*map(str, read.row)]
            if said := self._good(file, read.number, read.line, read.row):
                good.append((*said, file, read.number, read.line))
            if len(good) == BATCH:
                yield self._batch(good)
                good = []
        if good:
            yield self._batch(good)

    def _batch(self, good: list[tuple[bytes, bool, int, int, int]]) -> tuple[RecordBatch, dict[str, Any]]:
        """Rows that are kept, and how far all rows have been read."""
        import pyarrow

        assert self.form is not None
        batch = pyarrow.RecordBatch.from_arrays([*map(pyarrow.array, zip(*good, strict=True))], COLUMNS)
        state = dict(at=self.at, seen=self.seen, bad=self.bad, told=self.told)
        return batch, {**state, "format": self.form.NAME, "columns": self.columns}

    def _good(self, file: int, number: int, line: int, row: Any) -> tuple[bytes, bool] | None:
        """What is kept of a row as JSON, and whether its names are sorted; None: it is bad, which is noted."""
        there = kept(self.form, row, self.settings)
        if isinstance(there, str):
            self.bad += 1
            if len(self.told) < SHOWN:
                self.told.append(f"{self.source.told(file, number, line)}: {there}")
            return None
        in_order = _json(there)
        self._hash(in_order)
        # a template may write nested objects as they are, so their order is kept
        flat = _flat(there)
        return in_order if flat else json.dumps(there, ensure_ascii=False).encode(), flat

    def _hash(self, row: bytes) -> None:
        """The hash is that of the JSON list of all rows."""
        self.digest.update(b", " + row if self.good else row)
        self.good += 1

    def _taken(self) -> Iterator[Placed]:
        """The rows that are trained, after those that the store has seen."""
        rows = self.source.after(*self.at) if self.seen else self.source.rows(self.trained.start)
        with console.Counted("rows read", len(self.trained), self.seen) as progress:
            for count, placed in enumerate(itertools.islice(rows, len(self.trained) - self.seen), 1):
                yield placed
                if not count % 100:
                    progress.add(100)


def kept(form: type[Format] | None, row: Any, settings: Settings) -> Row | str:
    """The columns of a row that are used; or why it is bad, in words that follow its place."""
    if not isinstance(row, dict):
        return row if isinstance(row, Unread) else f"is {checks.kind(row)}, not an object"
    assert form is not None
    if problem := form.problem(row, settings):
        return problem
    needs = form.needs(settings)
    there = [column for column in form.reads(settings) if column in row]
    found = {column: row[column] for column in there if column in needs or not checks.empty(row[column])}
    try:
        if not _flat(found):
            _json(found)
    except (TypeError, UnicodeEncodeError) as error:  # Parquet has times and bytes; JSON has halves of characters
        return f"cannot be written as JSON ({first_line(error)})"
    return found


def _flat(row: Row) -> bool:
    """Whether a row holds texts alone."""
    return {*map(type, row.values())} == {str}


def refuse(told: list[str], bad: int, of: int, settings: Settings, needed: str) -> None:
    """Raise SettingsError that names bad rows, unless DROP_BAD_ROWS is set. told: sentences on the first; of: rows in all; needed: what a row needs."""
    if bad and not settings.drop_bad_rows:
        more = f" (and {bad - SHOWN} more)" if bad > SHOWN else ""
        raise SettingsError(
            *told[:SHOWN],
            f"{bad} of {of} rows are malformed{more}: {needed}. Mend them, or leave them out with DROP_BAD_ROWS=1.",
        )


def _json(row: Row) -> bytes:
    return DUMPS(row).encode()
