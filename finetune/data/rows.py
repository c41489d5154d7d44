"""Where the rows come from, which of them are taken, and which are refused. They stay on disk: nothing here grows with their number."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from finetune import console, sources
from finetune.data import checks, locate, reading, store
from finetune.data.formats import FORMATS, Format
from finetune.data.opened import File
from finetune.data.reading import Read, Row, Unread
from finetune.errors import SettingsError, first_line
from finetune.files import sha256
from finetune.settings import SPLIT, Settings
from finetune.sources import local

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pyarrow import RecordBatch

SHOWN = 5  # bad rows named in one message
BATCH = 1000  # rows written at a time
# settings that decide which rows there are and what is made of them; tests/unit/test_store.py compares them with what this package reads
DECIDING = (
    "dataset_name", "dataset_config", "dataset_split", "dataset_revision", "prompt_columns", "completion_columns", "train_on",
    "drop_bad_rows", "max_seq_length",
)  # fmt: skip
LATER = (
    "dataset_name",
    "dataset_revision",
    "max_seq_length",
    "train_on",
)  # the content says the first two; the others are for tokens
T = TypeVar("T")
Placed = tuple[int, Read]  # the number of a file, and a row of it


class Each(Sequence[T]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, size: int, get: Callable[[int], T], every: Callable[[], Iterator[T]] | None = None):
        """every: all of them one after the other, where that is faster."""
        self.size, self.get = size, get
        self.every = every or (lambda: map(get, range(size)))

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[T]:
        return self.every()

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self.get(index) for index in range(*key.indices(self.size))]
        if not -self.size <= key < self.size:
            raise IndexError(key)
        return self.get(int(key) % self.size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]


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


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that passed the checks. format: their form's name. seen, dropped: rows read, and left out.

    sha256: of their texts in order, so that equal data is known as equal. chosen: numbers of the rows that are taken; None: all.
    key: stands for the rows and all settings that made them.
    """

    name: str
    commit: str | None
    format: str
    seen: int
    dropped: int
    sha256: str
    files: list[str]
    stored: store.Stored
    key: dict[str, Any]
    chosen: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.stored) if self.chosen is None else len(self.chosen)

    @property
    def rows(self) -> Each[Row]:
        """The rows, each read when it is asked for."""
        every = self._every if self.chosen is None else None
        return Each(len(self), lambda index: json.loads(self._at(index)["json"]), every)

    @property
    def places(self) -> Each[str]:
        """Of each row: its file, number and line, such as "rows.jsonl row 3 (line 4)"."""
        return Each(len(self), lambda index: self._place(self._at(index)))

    def number(self, index: int) -> int:
        """Of the index-th row, among all that passed the checks."""
        return index if self.chosen is None else int(self.chosen[index])

    def place(self, number: int) -> str:
        """Where a row is, by its number among all that passed the checks."""
        return self._place(self._row(number))

    def some(self, numbers: Sequence[int]) -> list[Row]:
        """Rows by their numbers among all that passed the checks; fastest where they ascend."""
        found: list[Row] = []
        texts: Any
        last, texts = -1, []
        for number in numbers:
            batch, at = self.stored.at(number)
            if batch != last:
                last, texts = batch, self.stored.batch(batch).column("json")
            found.append(json.loads(texts[at].as_py()))
        return found

    def taken(self, chosen: NDArray[Any]) -> Rows:
        """The rows with these numbers alone, for example all but those that are held out."""
        return dataclasses.replace(self, chosen=chosen)

    def record(self) -> dict[str, Any]:
        """What run.json says of the data."""
        return dict(
            name=self.name,
            commit=self.commit,
            format=self.format,
            seen=self.seen,
            dropped=self.dropped,
            sha256=self.sha256,
        )

    def _every(self) -> Iterator[Row]:
        return (json.loads(text) for batch in self.stored for text in batch.column("json").to_pylist())

    def _at(self, index: int) -> Row:
        return self._row(self.number(index))

    def _row(self, number: int) -> Row:
        batch, at = self.stored.at(number)
        row: Row = self.stored.batch(batch).slice(at, 1).to_pylist()[0]
        return row

    def _place(self, row: Row) -> str:
        return _told(self.files, row["file"], row["number"], row["line"])


def load(settings: Settings) -> Rows:
    """Read and check the rows that DATASET_NAME and DATASET_SPLIT name, into a store; where that has them, nothing is read.

    Raises SettingsError that names file and row of the bad ones; with DROP_BAD_ROWS they are left out and counted.
    """
    name = settings.dataset_name
    if problem := local.url("DATASET_NAME", name):
        raise SettingsError(problem)
    source = _of_hub(settings) if locate.on_hub(name) else _of_files(settings)
    key = dict(
        version=store.version(),
        source=source.content,
        columns=sorted(_wanted(settings)),
        settings={name: getattr(settings, name) for name in DECIDING if name not in LATER},
    )
    with store.opened("rows", key) as opened:
        if opened.done is None:
            store.room(2 * source.size, "rows and tokens")
            opened = _Checked(settings, source, opened).stored()
        assert opened.done is not None
        said = opened.done
        FORMATS[said["format"]].check(settings)  # refused now, and not after a model was downloaded
        return Rows(
            name,
            source.commit,
            said["format"],
            said["seen"],
            said["bad"],
            said["sha256"],
            source.names,
            opened.rows(),
            key,
        )


class _Checked:
    """Reads rows, checks them, and writes the good ones to a store. It goes on where the store ends."""

    def __init__(self, settings: Settings, source: Source, opened: store.Store):
        self.settings, self.source, self.store = settings, source, opened
        state = opened.state
        self.at: tuple[int, int] = tuple(state.get("at", (0, 0)))  # file, and rows of it, that have been seen
        self.seen, self.bad, self.told = state.get("seen", 0), state.get("bad", 0), list(state.get("told", []))
        self.form: type[Format] | None = FORMATS.get(state.get("format", ""))
        self.digest, self.good = hashlib.sha256(b"["), 0

    def stored(self) -> store.Store:
        """The store, finished. Raises SettingsError where rows are bad, or none is good."""
        settings, source = self.settings, self.source
        for batch in self.store.rows() if self.store.shards else ():
            for row in batch.to_pylist():
                self._hash(row["json"] if row["sorted"] else _json(json.loads(row["json"])))
        written = self.store.write(self._batches())
        needs = self.form.needs(settings) if self.form else ()
        if not self.seen or (self.bad and not settings.drop_bad_rows) or not self.good:
            written.remove()
        if not self.seen:
            raise SettingsError(f"DATASET_NAME={settings.dataset_name}: holds no rows in {settings.dataset_split}")
        refuse(self.told, self.bad, self.seen, settings, f"every row needs text in {', '.join(needs)}")
        if not self.good:
            raise SettingsError(
                f"DATASET_NAME={settings.dataset_name}: all {self.bad} rows are malformed; the first is {self.told[0]}"
            )
        self.digest.update(b"]")
        assert self.form is not None
        return written.finish(
            dict(
                format=self.form.NAME, seen=self.seen, bad=self.bad, sha256=self.digest.hexdigest(), files=source.names
            )
        )

    def _batches(self) -> Iterator[tuple[RecordBatch, dict[str, Any]]]:
        import pyarrow

        kept: list[tuple[bytes, bool, int, int, int]] = []
        columns = ("json", "sorted", "file", "number", "line")
        for file, read in self._taken():
            self.seen, self.at = self.seen + 1, (file, read.number)
            if self.form is None and isinstance(read.row, dict):
                self.form = next(form for form in FORMATS.values() if form.recognises(read.row, self.settings))
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
        return dict(at=self.at, seen=self.seen, bad=self.bad, told=self.told, format=self.form.NAME)

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
            needs = self.form.needs(settings)
            kept = {column: row[column] for column in self.form.reads(settings) if column in needs or row.get(column)}
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
            self.told.append(f"{_told(self.source.names, file, read.number, read.line)}: {problem}")
        return None

    def _hash(self, row: bytes) -> None:
        """The hash is that of the JSON list of all rows."""
        self.digest.update(b", " + row if self.good else row)
        self.good += 1

    def _taken(self) -> Iterator[Placed]:
        """The rows of the slice, after those that the store has seen."""
        first, stop = _bounds(self.settings, self.source)
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


def _told(names: list[str], file: int, number: int, line: int) -> str:
    return f"{names[file]} row {number}{f' (line {line})' if line else ''}"


def refuse(told: list[str], bad: int, of: int, settings: Settings, needed: str) -> None:
    """Raise SettingsError that names bad rows, unless DROP_BAD_ROWS is set. told: sentences on the first; of: rows in all; needed: what a row needs."""
    if bad and not settings.drop_bad_rows:
        more = f" (and {bad - SHOWN} more)" if bad > SHOWN else ""
        raise SettingsError(
            *told[:SHOWN],
            f"{bad} of {of} rows are malformed{more}: {needed}. Mend them, name other columns (PROMPT_COLUMNS, "
            "COMPLETION_COLUMNS), or leave them out with DROP_BAD_ROWS=1.",
        )


def _of_files(settings: Settings) -> Source:
    notes: list[str] = []
    found, wanted = locate.files(settings, notes), _wanted(settings)
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


def _of_hub(settings: Settings) -> Source:
    """The rows of a split on the Hub."""
    name, split = settings.dataset_name, locate.split_of(settings)
    commit, found = sources.hub().dataset(settings, split)
    names = found.column_names
    # others may hold pictures, or values that Python cannot. If none is wanted, keep one: without columns there are no rows
    used = found.select_columns([column for column in names if column in _wanted(settings)] or names[:1])

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
    import os

    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def _wanted(settings: Settings) -> set[str]:
    """Columns that rows may be made of."""
    return {column for form in FORMATS.values() for column in form.reads(settings)}


def _bounds(settings: Settings, source: Source) -> tuple[int, int | None]:
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
