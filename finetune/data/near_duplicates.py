"""Held-out rows that training knows almost word for word: like a trained row, they say nothing about new questions.

Rows are compared by hashes of their tokens, in numpy, while the trained rows pass by in blocks, so that memory does not grow with
their number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Ids = Any  # a numpy array of one dimension, which mypy does not tell from a single number

GRAM = 8  # tokens in a row that are compared, and the share of a row's that one trained row may have: those of Tulu 3
SHARE = 0.5  # (arXiv 2411.15124), which looks for test questions in training data
BITS = 22  # of the table that sorts out grams at once which no held-out row has: 4 MiB, which a core's cache holds
ODD = np.uint64(0x9E3779B97F4A7C15)


def near_duplicates(held: Sequence[Sequence[int]], trained: Iterable[tuple[Ids, Ids]], common: int) -> list[bool]:
    """For each held-out row, whether it is in training (almost) word for word, or equal to a held-out row before it.

    trained: blocks of rows, each as all its ids end to end (int) and the length of each row. common: tokens that all trained rows begin
    with. A row is a near-duplicate where one single trained row has SHARE of its distinct runs of GRAM tokens. Runs that more than half
    of the held-out rows have are the template's and tell nothing.
    """
    known, seen = _Known.of(held, common), [False] * len(held)
    for ids, lengths in trained:
        for index in known.found(ids, lengths):
            seen[index] = True
    first: dict[tuple[int, ...], int] = {}
    return [
        twice or first.setdefault(tuple(row), index) != index
        for index, (twice, row) in enumerate(zip(seen, held, strict=True))
    ]


@dataclasses.dataclass(frozen=True)
class _Known:
    """The held-out rows' grams. grams: sorted hashes. owners: which rows have gram i, from starts[i] to starts[i + 1].

    needed: how many of its grams make a row a near-duplicate. table: whether any gram has these highest bits. whole: all ids, as bytes -> rows. lengths: of the rows.
    """

    common: int
    grams: Ids
    owners: Ids
    starts: Ids
    needed: Ids
    table: Ids
    whole: dict[bytes, list[int]]
    lengths: Ids

    @classmethod
    def of(cls, held: Sequence[Sequence[int]], common: int) -> _Known:
        flat: Ids = np.array([i for row in held for i in row], np.int64)
        lengths: Ids = np.array([len(row) for row in held])
        ends: Ids = np.cumsum(lengths)
        grams = hashes(flat)
        rows: Ids = np.searchsorted(ends, np.arange(len(grams)), side="right")
        inside = _inside(np.arange(len(grams)), rows, lengths, ends, common)
        grams, rows = grams[inside], rows[inside]
        pairs = np.unique(np.stack([grams, rows.astype(np.uint64)]), axis=1)
        grams, index, counts = np.unique(pairs[0], return_inverse=True, return_counts=True)
        kept = (counts <= max(1, len(held) / 2))[index]
        pairs = pairs[:, kept]
        grams, counts = np.unique(pairs[0], return_counts=True)
        owners = pairs[1].astype(np.int64)
        total = np.bincount(owners, minlength=len(held))
        table = np.zeros(2**BITS, bool)
        table[grams >> np.uint64(64 - BITS)] = True
        whole: dict[bytes, list[int]] = {}
        for index, row in enumerate(held):
            whole.setdefault(np.array(row, np.int64).tobytes(), []).append(index)
        needed = np.where(total > 0, np.ceil(SHARE * total), np.inf)
        return cls(common, grams, owners, np.concatenate([[0], np.cumsum(counts)]), needed, table, whole, lengths)

    def found(self, ids: Ids, lengths: Ids) -> set[int]:
        """The held-out rows that are near-duplicates of one of these rows."""
        ends: Ids = np.cumsum(lengths)
        same = self._equal(ids, lengths, ends)
        every = hashes(ids)
        places = np.flatnonzero(self.table[every >> np.uint64(64 - BITS)])
        rows: Ids = np.searchsorted(ends, places, side="right")
        inside = _inside(places, rows, lengths, ends, self.common)
        places, rows = places[inside], rows[inside]
        if not len(places) or not len(self.grams):
            return same
        wanted = every[places]
        at = np.searchsorted(self.grams, wanted).clip(max=len(self.grams) - 1)
        hit = self.grams[at] == wanted
        pairs = np.unique(rows[hit] * len(self.grams) + at[hit])  # a gram counts once in a row
        rows, at = np.divmod(pairs, len(self.grams))
        owned = self.starts[at + 1] - self.starts[at]
        offsets = np.arange(owned.sum()) - np.repeat(np.cumsum(owned) - owned, owned)
        owners = self.owners[np.repeat(self.starts[at], owned) + offsets]
        both, counts = np.unique(np.repeat(rows, owned) * len(self.needed) + owners, return_counts=True)
        owner = both % len(self.needed)
        return same | set(owner[counts >= self.needed[owner]].tolist())

    def _equal(self, ids: Ids, lengths: Ids, ends: Ids) -> set[int]:
        """The held-out rows that are among these rows, which may be too short to have grams."""
        likely = np.flatnonzero(np.isin(lengths, self.lengths))
        parts = (ids[ends[row] - lengths[row] : ends[row]].astype(np.int64).tobytes() for row in likely)
        return {row for part in parts for row in self.whole.get(part, ())}


def hashes(ids: Ids) -> Ids:
    """A hash of each run of GRAM ids, also of those that reach into the next row."""
    found = (ids.astype(np.uint64) + np.uint64(1)) * ODD
    for size, power in ((1, 3), (2, 0xD6E8FEB86659FD93), (4, 0xA0761D6478BD642F)):  # of two neighbours one, three times
        found = found[: max(0, len(found) - size)] * np.uint64(power) + found[size:]
    found ^= found >> np.uint64(29)
    found *= ODD
    return found


def _inside(places: Ids, rows: Ids, lengths: Ids, ends: Ids, common: int) -> Ids:
    """Which runs, known by their places and rows, are of one row and behind the common beginning."""
    return (places + GRAM <= ends[rows]) & (places >= ends[rows] - lengths[rows] + common)
