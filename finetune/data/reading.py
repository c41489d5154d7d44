"""Rows of files: JSON, JSON lines, CSV, TSV, plain text, tables. Each row has its place, and a bad one is told and not raised."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple

from finetune.data import opened, sheets, tables
from finetune.data.checks import whole
from finetune.data.opened import File
from finetune.errors import SettingsError

Row = dict[str, Any]
PIECE = 2**20  # characters of a JSON list that are read at a time
NEAR = 16  # characters: more than the longest word or escape of JSON
EXAMPLE = '{"Question": "…"}'


class Unread(str):
    """Why a row could not be read, in words that follow its place."""


class Read(NamedTuple):
    """A row with its place: number counts from 1 in its file; line is where it stands or ends, 0 where a file has no lines."""

    number: int
    line: int
    row: Any  # an object where all is well; else any other value of JSON, or Unread


Reader = Callable[[File, set[str], int], Iterator[Read]]


def rows(file: File, wanted: set[str], after: int = 0) -> Iterator[Read]:
    """The rows of a file of one of READERS. wanted: the columns to read, in kinds of files that can skip others.

    after: rows at the beginning that are left out, and where it can be not even looked at.

    A row that cannot be read is Unread; what is wrong with a whole file is raised as SettingsError, which names file and place.
    """
    reader = READERS[file.kind]
    try:
        if reader not in BINARY:
            with file.stream() as stream:
                opened.marked(file, stream.read(4))
        yield from reader(file, wanted, after)
    except UnicodeDecodeError:
        raise opened.not_utf8(file) from None


def count(file: File, most: int | None) -> int:
    """How many rows a file has, or `most` if it has more."""
    reader = READERS[file.kind]
    if reader in BINARY:
        found = tables.count(file, reader is _parquet)
        return found if most is None else min(found, most)
    if reader in (_jsonl, _text):
        with file.stream() as stream:
            return sum(1 for _ in itertools.islice((line for line in stream if not line.isspace()), most))
    return sum(1 for _ in itertools.islice(rows(file, set()), most))


def _lines(file: File, stream: IO[bytes]) -> Iterator[tuple[int, str | Unread]]:
    """The lines that are not blank, with their numbers. A bad byte spoils one line alone."""
    begin = 0
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            text: str | Unread = line.decode()
        except UnicodeDecodeError as error:
            text = Unread(opened.wrong(file, f"byte {begin + error.start + 1} of the file", line))
        begin += len(line)
        if text.strip():
            yield number, text


def _jsonl(file: File, _: set[str], after: int) -> Iterator[Read]:
    scan = json.JSONDecoder(object_pairs_hook=whole).raw_decode
    with file.stream() as stream:
        for index, (number, line) in _from(after, _lines(file, stream)):
            row: Any = line
            if not isinstance(line, Unread):
                try:
                    text = line.strip(" \t\n\r")  # what JSON takes for white space
                    row, end = scan(text)
                    if end < len(text):
                        raise json.JSONDecodeError("Extra data", text, end)
                except (ValueError, RecursionError) as error:
                    row = Unread(f"is {_not_json(error)}; each line is one object, such as {EXAMPLE}")
            yield Read(index, number, row)


def _text(file: File, _: set[str], after: int) -> Iterator[Read]:
    with file.stream() as stream:
        for index, (number, line) in _from(after, _lines(file, stream)):
            row = line if isinstance(line, Unread) else {"text": line.rstrip("\r\n")}
            yield Read(index, number, row)


def _from(after: int, items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Items with their numbers, from 1 on, without those up to `after`."""
    return itertools.islice(enumerate(items, 1), after, None)


def _json(file: File, _: set[str], after: int) -> Iterator[Read]:
    with file.stream() as stream, io.TextIOWrapper(stream, "utf-8-sig") as text:
        begin = text.read(PIECE)
        if begin.lstrip()[:1] != "[":
            items: Iterable[Any] = _whole(file, begin + text.read())
        else:
            items = _Items(file, text, begin).items()
        for index, row in _from(after, items):
            yield Read(index, 0, row)


def _whole(file: File, text: str) -> list[Any]:
    """The rows of an object with one list of them, such as {"data": [...]}."""
    try:
        found = json.loads(text, object_pairs_hook=whole)
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f"DATASET_NAME={file.shown}: {_not_json(error)}; it takes a list of objects, such as [{EXAMPLE}], and a file "
            "with one object a line is named .jsonl"
        ) from None
    lists = {name: value for name, value in found.items() if isinstance(value, list)} if isinstance(found, dict) else {}
    if len(lists) != 1:
        raise SettingsError(
            f"DATASET_NAME={file.shown}: holds no list; it takes a list of objects, such as [{EXAMPLE}]"
        )
    ((name, rows),) = lists.items()
    if any(isinstance(row, dict) and {"role", "from"} & {*row} for row in rows[:1]):
        raise SettingsError(
            f"DATASET_NAME={file.shown}: is one conversation and no list of rows; put it in a list, such as "
            f'[{{"{name}": […]}}]'
        )
    others = ", ".join(key for key in found if key != name)
    print(f"data: {file.shown}: the rows are the list {name}{f'; {others} is not read' if others else ''}", flush=True)
    return rows


class _Items:
    """The items of a JSON list, read a piece at a time: a list of a million rows need not fit the memory."""

    def __init__(self, file: File, stream: io.TextIOWrapper, begin: str):
        self.file, self.stream = file, stream
        self.buffer, self.at, self.lines = begin, begin.index("[") + 1, 1  # lines: up to the buffer
        self.decode = json.JSONDecoder(object_pairs_hook=whole).raw_decode

    def items(self) -> Iterator[Any]:
        """Each item. Raises SettingsError that names the line where the text is no JSON."""
        index, between = 0, False
        while (char := self._next()) != "]":
            if not char:
                raise self._refusal(index, "not JSON (the list does not end)", self.at)
            if between != (char == ","):
                raise self._refusal(index, "not JSON (a list has a comma between two values)", self.at)
            if between:
                self.at += 1
                self._next()
            index, between = index + 1, True
            yield self._item(index)
        self.at += 1
        if self._next():
            raise self._refusal(index, "not JSON (something follows the list)", self.at)

    def _next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            rest = self.buffer[self.at : self.at + 100].lstrip()
            if rest:
                self.at = self.buffer.index(rest[0], self.at)
                return rest[0]
            self.at = min(self.at + 100, len(self.buffer))
            if self.at == len(self.buffer) and not self._more():
                return ""

    def _item(self, index: int) -> Any:
        while True:
            try:
                value, end = self.decode(self.buffer, self.at)
            except RecursionError:
                raise self._refusal(index, "nested too deeply", self.at) from None
            except json.JSONDecodeError as error:
                # what is only cut goes wrong at the end of the buffer, but for a string, of which the beginning is told
                cut = error.pos > len(self.buffer) - NEAR or error.msg.startswith("Unterminated")
                if not (cut and self._more()):
                    raise self._refusal(index, f"not JSON ({error.msg})", error.pos) from None
                continue
            except ValueError as error:
                raise self._refusal(index, f"not JSON ({error})", self.at) from None
            if end < len(self.buffer) or not self._more():  # a number may go on
                self.at = end
                return value

    def _more(self) -> bool:
        """Read on; what was used is forgotten. The pieces grow, so that a long row is not tried too often."""
        piece = self.stream.read(max(PIECE, len(self.buffer) - self.at))
        if piece:
            self.lines += self.buffer.count("\n", 0, self.at)
            self.buffer, self.at = self.buffer[self.at :] + piece, 0
        return bool(piece)

    def _refusal(self, index: int, why: str, at: int) -> SettingsError:
        line = self.lines + self.buffer.count("\n", 0, at)
        return SettingsError(f"DATASET_NAME={self.file.shown}: {why} in row {index}, line {line}")


def _not_json(error: ValueError | RecursionError) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else f"not JSON ({error})"


def _csv(file: File, _: set[str], after: int, delimiter: str = ",") -> Iterator[Read]:
    csv.field_size_limit(2**31 - 1)
    kind = file.kind[1:].upper()
    with file.stream() as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True, delimiter=delimiter)
        try:
            tables.named_once(file, reader.fieldnames or ())
            row: Any
            for index, row in _from(after, reader):
                if None in row:
                    row = Unread(
                        f"has more fields than the header; put fields with {'tabs' if delimiter != ',' else 'commas'} in quotes"
                    )
                yield Read(index, reader.line_num, row)
        except csv.Error as error:  # where a quote is missing, nobody knows where the next row begins
            raise SettingsError(f"{file.shown} line {reader.line_num}: not {kind} ({error})") from None


def _tsv(file: File, wanted: set[str], after: int) -> Iterator[Read]:
    return _csv(file, wanted, after, "\t")


def _parquet(file: File, wanted: set[str], after: int) -> Iterator[Read]:
    return (Read(index, 0, row) for index, row in enumerate(tables.parquet(file, wanted, after), after + 1))


def _arrow(file: File, wanted: set[str], after: int) -> Iterator[Read]:
    return (Read(index, 0, row) for index, row in enumerate(tables.arrow(file, wanted, after), after + 1))


def _xlsx(file: File, _: set[str], after: int) -> Iterator[Read]:
    for index, (line, row) in _from(after, sheets.rows(file)):
        yield Read(index, line, Unread(row) if isinstance(row, str) else row)


READERS: dict[str, Reader] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet, ".arrow": _arrow,
    ".txt": _text, sheets.KIND: _xlsx,
}  # fmt: skip
BINARY = (_parquet, _arrow)
