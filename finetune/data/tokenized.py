"""The tokens of many rows, made in batches and processes, into a store and out of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from finetune import console
from finetune.data import processes, store
from finetune.data.checked import SHOWN, refuse
from finetune.data.encoder import Encoder
from finetune.data.packing import Counts, TokenRows, packed
from finetune.data.rows import Rows
from finetune.errors import SettingsError
from finetune.settings import Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pyarrow import RecordBatch

CHUNK = 500  # rows given to a process at a time
LENGTHS = "lengths.npy"


def tokenized(
    rows: Rows, encoder: Encoder, settings: Settings, key: dict[str, Any]
) -> tuple[TokenRows, NDArray[Any], dict[str, Any], Path]:
    """The tokens of rows, the length of each, what was counted, and the folder of the store. key: all that decides them.

    Raises SettingsError that names rows which cannot be trained on, MachineError where a process was killed.
    """
    with store.opened("tokens", key) as opened:
        if opened.done is None:
            opened = Tokenized(rows, encoder, settings, opened).stored()
        assert opened.done is not None
        return TokenRows(opened.rows(mapped=True)), numpy.load(opened.folder / LENGTHS), opened.done, opened.folder


class Tokenized:
    """Makes tokens of rows, and writes them to a store. It goes on where the store ends."""

    def __init__(self, rows: Rows, encoder: Encoder, settings: Settings, opened: store.Store):
        self.rows, self.encoder, self.settings, self.store = rows, encoder, settings, opened
        self.read = opened.state.get("read", 0)  # rows that have been tokenized, whatever came of them
        self.bad, self.told = opened.state.get("bad", 0), list(opened.state.get("told", []))
        self.counts = Counts()

    def stored(self) -> store.Store:
        """The store, finished. Raises SettingsError where rows are bad, or none is good."""
        rows, settings, counts = self.rows, self.settings, self.counts
        for batch in self.store.rows() if self.store.shards else ():
            counts.add(batch)
        written = self.store.write(self._batches())
        if (self.bad and not settings.drop_bad_rows) or self.bad == len(rows):
            written.remove()
        refuse(self.told, self.bad, len(rows), settings, "what a row says has to be trained")
        if self.bad == len(rows):
            raise SettingsError(f"DATASET_NAME={rows.name}: no row can be trained on; the first is {self.told[0]}")
        numpy.save(written.folder / LENGTHS, numpy.concatenate(counts.lengths))
        return written.finish(
            dict(
                largest=counts.largest,
                common=counts.common,
                trained=counts.trained,
                dropped=self.bad,
                sha256=counts.digest.hexdigest(),
                flags=counts.flags,
                first_row=counts.first_row,
            )
        )

    def _batches(self) -> Iterator[tuple[RecordBatch, dict[str, Any]]]:
        total = len(self.rows)
        pieces = [(start, min(start + CHUNK, total)) for start in range(self.read, total, CHUNK)]
        count = self.settings.dataset_num_proc if total - self.read > processes.FEW_ROWS else 1
        with console.Counted("rows tokenized", total, self.read) as progress:
            for (start, stop), (batch, bad) in zip(pieces, processes.results(self._piece, pieces, count), strict=True):
                self.read, self.bad = stop, self.bad + len(bad)
                self.told += [f"{self.rows.places[number]}: {why}" for number, why in bad[: SHOWN - len(self.told)]]
                self.counts.add(batch)
                progress.add(stop - start)
                if batch.num_rows:
                    yield batch, dict(read=self.read, bad=self.bad, told=self.told)

    def _piece(self, piece: tuple[int, int]) -> tuple[RecordBatch, list[tuple[int, str]]]:
        """The tokens of some rows, and what is wrong with those that cannot be trained on."""
        numbers = range(*piece)
        made = self.encoder.many(self.rows.some(numbers))
        bad = [(number, row["problem"]) for number, row in zip(numbers, made, strict=True) if row["problem"]]
        good = [(number, row) for number, row in zip(numbers, made, strict=True) if not row["problem"]]
        return packed([row for _, row in good], [number for number, _ in good]), bad
