"""Tokens of many rows as arrays: which of them are trained is kept as spans, and counted and hashed a batch at a time."""

from __future__ import annotations

import array
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.formats import base
from finetune.data.shown import IGNORE_INDEX
from finetune.data.store import Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pyarrow import RecordBatch

FLAGS = ("truncated", *base.FLAGS)  # what there is to say of a row


def packed(rows: Sequence[dict[str, Any]], numbers: Sequence[int]) -> RecordBatch:
    """A batch of rows with input_ids and labels. numbers: of the rows, to find their places.

    Columns input_ids (int32), trained (pairs of numbers: where trained tokens begin and end), row, and the flags.
    """
    import pyarrow

    lengths = np.array([len(row["input_ids"]) for row in rows], np.int64)
    ids, labels = _flat(rows, "input_ids"), _flat(rows, "labels")
    offsets = _offsets(lengths)
    spans, of = _spans(labels != IGNORE_INDEX, offsets)
    counts = np.bincount(of, minlength=len(rows)) * 2
    columns = {
        "input_ids": pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), pyarrow.array(ids)),
        "trained": pyarrow.ListArray.from_arrays(
            pyarrow.array(_offsets(counts), pyarrow.int32()), pyarrow.array(spans)
        ),
        "row": pyarrow.array(numbers, pyarrow.int64()),
        **{flag: pyarrow.array([bool(row[flag]) for row in rows], pyarrow.bool_()) for flag in FLAGS},
    }
    return pyarrow.RecordBatch.from_arrays([*columns.values()], [*columns])


def _flat(rows: Sequence[dict[str, Any]], column: str) -> NDArray[Any]:
    made = array.array("i")
    for row in rows:
        made.fromlist(row[column])
    return np.frombuffer(made, np.int32) if made else np.zeros(0, np.int32)


def _offsets(lengths: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([[0], np.cumsum(lengths)])


def _spans(trained: NDArray[Any], offsets: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Begin and end of each run of trained tokens, counted in its row, one after the other; and the row of each."""
    before, after = np.roll(trained, 1), np.roll(trained, -1)
    filled = offsets[1:] > offsets[:-1]
    before[offsets[:-1][filled]] = after[offsets[1:][filled] - 1] = False
    begins: NDArray[Any] = np.flatnonzero(trained & ~before)
    ends: NDArray[Any] = np.flatnonzero(trained & ~after) + 1
    of = np.searchsorted(offsets, begins, "right") - 1
    return np.stack([begins - offsets[of], ends - offsets[of]], 1).astype(np.int32).ravel(), of


def arrays(batch: RecordBatch) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """All ids of a batch, all labels, and where each row begins and ends."""
    ids, offsets = _values(batch.column("input_ids"))
    spans, of = _values(batch.column("trained"))
    row: NDArray[Any] = np.repeat(np.arange(len(of) - 1), np.diff(of))[::2]
    steps: NDArray[Any] = np.zeros(len(ids) + 1, np.int32)
    np.add.at(steps, spans[::2] + offsets[row], 1)
    np.add.at(steps, spans[1::2] + offsets[row], -1)
    return ids, np.where(np.cumsum(steps[:-1]) > 0, ids, np.int32(IGNORE_INDEX)), offsets


def _values(column: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """The numbers of a column of lists, without a copy, and where each list begins and ends."""
    offsets = column.offsets.to_numpy()
    return column.values.to_numpy()[offsets[0] : offsets[-1]], offsets.astype(np.int64) - offsets[0]


class Counts:
    """What is counted of all rows, in their order. common: with how many tokens, labels included, every row begins."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.lengths: list[NDArray[Any]] = []
        self.trained = self.largest = self.common = 0
        self.first: tuple[NDArray[Any], NDArray[Any]] | None = None
        self.flags = dict.fromkeys(FLAGS, 0)
        self.first_row: dict[str, int] = {}  # of each flag

    def add(self, batch: RecordBatch) -> None:
        """Count a batch. The hash is that of each row's length (8 bytes), ids and labels (4 bytes each), one row after the other."""
        if not batch.num_rows:
            return
        ids, labels, offsets = arrays(batch)
        lengths = np.diff(offsets)
        self.lengths.append(lengths.astype(np.int32))
        self.largest = max(self.largest, int(ids.max()))
        self.trained += int((labels != IGNORE_INDEX).sum())
        self.digest.update(_bytes(ids, labels, offsets))
        if self.first is None:
            self.first, self.common = (ids[: lengths[0]].copy(), labels[: lengths[0]].copy()), int(lengths[0])
        self.common = self._common(ids, labels, offsets)
        for flag in FLAGS:
            found = batch.column(flag).to_numpy(zero_copy_only=False)
            self.flags[flag] += int(found.sum())
            if found.any():
                self.first_row.setdefault(flag, batch.column("row")[int(found.argmax())].as_py())

    def _common(self, ids: NDArray[Any], labels: NDArray[Any], offsets: NDArray[Any]) -> int:
        assert self.first is not None
        size = min(self.common, int(np.diff(offsets).min()))
        at = offsets[:-1, None] + np.arange(size)
        same = (ids[at] == self.first[0][:size]) & (labels[at] == self.first[1][:size])
        differ = np.flatnonzero(~same.all(0))
        return int(differ[0]) if len(differ) else size


def _bytes(ids: NDArray[Any], labels: NDArray[Any], offsets: NDArray[Any]) -> bytes:
    lengths = np.diff(offsets)
    begins = 2 * offsets[:-1] + 2 * np.arange(len(lengths))
    made: NDArray[Any] = np.zeros(2 * len(ids) + 2 * len(lengths), "<i4")  # a length takes the place of two tokens
    made[begins] = lengths
    at = np.arange(len(ids)) + np.repeat(begins + 2 - offsets[:-1], lengths)
    made[at] = ids
    made[at + np.repeat(lengths, lengths)] = labels
    return made.tobytes()


class TokenRows(Sequence[dict[str, list[int]]]):
    """What is trained on: rows with input_ids and labels, lists of ints, read from mapped shards.

    A number gives a row, a slice a dictionary of lists, and a column's name all of it.
    """

    def __init__(self, stored: Stored):
        self.stored = stored

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return [row[key] for row in self]
        if isinstance(key, slice):
            rows = [self[index] for index in range(*key.indices(len(self)))]
            return {column: [row[column] for row in rows] for column in ("input_ids", "labels")}
        if not -len(self) <= key < len(self):
            raise IndexError(key)
        number, index = self.stored.at(int(key) % len(self))
        batch = self.stored.batch(number).slice(index, 1)
        ids, labels, _ = arrays(batch)
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[index] for index in range(len(self)))

    def blocks(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """The ids of all rows, some rows at a time: all their ids end to end, and the length of each."""
        for batch in self.stored:
            ids, offsets = _values(batch.column("input_ids"))
            yield ids, np.diff(offsets)

    def numbers(self) -> Iterator[int]:
        """The number of each row among the rows that were read."""
        for batch in self.stored:
            yield from batch.column("row").to_pylist()
