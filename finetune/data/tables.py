"""Rows of Parquet and Arrow files, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from finetune.data.opened import File
from finetune.errors import SettingsError, first_line

if TYPE_CHECKING:
    from pyarrow import RecordBatch

Row = dict[str, Any]
BATCH = 1000  # rows that are Python objects at a time


def parquet(file: File, wanted: set[str], after: int) -> Iterator[Row]:
    """The rows of a Parquet file. Columns that are not wanted are None: Python may be unable to hold their values, but messages name them.

    after: rows at the beginning that are left out. Raises SettingsError where the file is damaged or holds what Python cannot.
    """
    import pyarrow
    from pyarrow import parquet

    with file.at_once() as path:
        try:
            opened = parquet.ParquetFile(path)
            names = opened.schema_arrow.names
            named_once(file, names)
            batches = opened.iter_batches(BATCH, columns=[name for name in names if name in wanted], use_threads=False)
            yield from _rows(file, names, wanted, batches, after)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise _damaged(file, "Parquet", error) from None


def arrow(file: File, wanted: set[str], after: int) -> Iterator[Row]:
    """The rows of an Arrow file, or of an Arrow stream, as `datasets` writes it. As `parquet`."""
    import pyarrow

    with file.at_once() as path:
        try:
            with pyarrow.memory_map(str(path)) as mapped:
                schema, batches = _batches(mapped)
                named_once(file, schema.names)
                yield from _rows(file, schema.names, wanted, batches, after)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise _damaged(file, "Arrow", error) from None


def count(file: File, is_parquet: bool) -> int:
    """How many rows a file has, as it says itself. Raises SettingsError where it is damaged."""
    import pyarrow
    from pyarrow import parquet

    with file.at_once() as path:
        try:
            if is_parquet:
                return int(parquet.ParquetFile(path).metadata.num_rows)
            with pyarrow.memory_map(str(path)) as mapped:
                return sum(batch.num_rows for batch in _batches(mapped)[1])
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise _damaged(file, "Parquet" if is_parquet else "Arrow", error) from None


def named_once(file: File, names: Sequence[str]) -> None:
    """Refuse two columns with one name: a row would keep only the last. Columns without a name may repeat: no setting names them."""
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise SettingsError(
            f"DATASET_NAME={file.shown}: has more than one column {twice}; name each column once, for example {twice}_2"
        )


def _batches(mapped: Any) -> tuple[Any, Iterable[RecordBatch]]:
    """The schema of an Arrow file or stream, and its batches."""
    import pyarrow

    try:
        opened = pyarrow.ipc.open_file(mapped)
    except pyarrow.ArrowInvalid:
        mapped.seek(0)
        stream = pyarrow.ipc.open_stream(mapped)
        return stream.schema, stream
    return opened.schema, (opened.get_batch(index) for index in range(opened.num_record_batches))


def _rows(
    file: File, names: Sequence[str], wanted: set[str], batches: Iterable[RecordBatch], after: int
) -> Iterator[Row]:
    used, missing = [name for name in names if name in wanted], dict.fromkeys(names)
    for batch in batches:
        kept, first = batch.select(used), min(after, batch.num_rows)
        after -= first
        for start in range(first, batch.num_rows, BATCH):
            piece = kept.slice(start, BATCH)
            for row in _converted(file, piece) if used else [{}] * min(BATCH, batch.num_rows - start):
                yield {**missing, **row}


def _converted(file: File, batch: RecordBatch) -> list[Row]:
    try:
        rows: list[Row] = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # a time beyond Python's, bytes that are not UTF-8
        names = ", ".join(batch.schema.names)
        raise SettingsError(
            f"DATASET_NAME={file.shown}: one of {names} cannot be read ({first_line(error)}); save it as text"
        ) from None
    return rows


def _damaged(file: File, kind: str, error: Exception) -> SettingsError:
    return SettingsError(f"DATASET_NAME={file.shown}: not a whole {kind} file ({first_line(error)})")
