"""Files of rows: JSON, JSON lines, CSV and Parquet, each row with its place for messages."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.checks import whole
from finetune.errors import SettingsError, first_line

if TYPE_CHECKING:
    from pyarrow import RecordBatch

Row = dict[str, Any]
Placed = tuple[str, Row]  # a row, after "row 3 (line 4)"


def rows(path: Path, wanted: set[str]) -> Iterator[Placed]:
    """The rows of a file whose name ends in one of READERS. wanted: the columns to read, in formats that can skip others.

    Raises SettingsError that names the file, the place in it, and what is wrong there.
    """
    try:
        yield from READERS[path.suffix.lower()](path, wanted)
    except UnicodeDecodeError as error:
        raise SettingsError(f"DATASET_NAME={path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise SettingsError(f"DATASET_NAME={path}: cannot be read ({error.strerror or first_line(error)})") from None


def _jsonl(path: Path, _: set[str]) -> Iterator[Placed]:
    index = 0
    with open(path, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            index += 1
            try:
                row = json.loads(line, object_pairs_hook=whole)
            except (ValueError, RecursionError) as error:
                raise SettingsError(
                    f'{path} line {number}: {_not_json(error)}; each line is one object, such as {{"Question": "…"}}'
                ) from None
            yield f"row {index} (line {number})", row


def _json(path: Path, _: set[str]) -> Iterator[Placed]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text, object_pairs_hook=whole)
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f'DATASET_NAME={path}: {_not_json(error)}; it takes a list of objects, such as [{{"Question": "…"}}], and a file '
            "with one object a line is named .jsonl"
        ) from None
    if isinstance(rows, dict):  # {"data": [...]} and the like
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else rows
    if not isinstance(rows, list):
        raise SettingsError(
            f'DATASET_NAME={path}: holds no list; it takes a list of objects, such as [{{"Question": "…"}}]'
        )
    for index, row in enumerate(rows, 1):
        yield f"row {index}", row


def _not_json(error: ValueError | RecursionError) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else f"not JSON ({error})"


def _csv(path: Path, _: set[str]) -> Iterator[Placed]:
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            _named_once(path, reader.fieldnames or ())
            for index, row in enumerate(reader, 1):
                place = f"row {index} (line {reader.line_num})"
                if None in row:
                    raise SettingsError(
                        f"{path} {place}: has more fields than the header; put fields with commas in quotes"
                    )
                yield place, row
        except csv.Error as error:
            raise SettingsError(f"{path} line {reader.line_num}: not CSV ({error})") from None


def _parquet(path: Path, wanted: set[str]) -> Iterator[Placed]:
    """Columns that are not wanted are None: Python may be unable to hold their values, but messages still name them."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        _named_once(path, names)
        index = 0
        for batch in file.iter_batches(columns=[name for name in names if name in wanted]):
            for row in _converted(path, batch):
                index += 1
                yield f"row {index}", {**dict.fromkeys(names), **row}
    except pyarrow.ArrowInvalid as error:
        raise SettingsError(f"DATASET_NAME={path}: not a whole Parquet file ({first_line(error)})") from None


def _converted(path: Path, batch: RecordBatch) -> list[Row]:
    try:
        rows: list[Row] = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # a time beyond Python's, bytes that are not UTF-8
        names = ", ".join(batch.schema.names)
        raise SettingsError(
            f"DATASET_NAME={path}: one of {names} cannot be read ({first_line(error)}); save it as text"
        ) from None
    return rows


def _named_once(path: Path, names: Sequence[str]) -> None:
    """Refuse two columns with one name: a row would keep only the last. Columns without a name may repeat: no setting names them."""
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise SettingsError(
            f"DATASET_NAME={path}: has more than one column {twice}; name each column once, for example {twice}_2"
        )


READERS: dict[str, Callable[[Path, set[str]], Iterator[Placed]]]
READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
