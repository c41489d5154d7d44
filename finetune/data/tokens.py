"""Training text -> tokens, once for both engines, and which of them the loss is on."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from finetune import console
from finetune.data import processes, shown, store
from finetune.data.checked import SHOWN, refuse
from finetune.data.encoder import Encoder
from finetune.data.formats import FORMATS, Format
from finetune.data.formats.base import FLAGS
from finetune.data.kept import Guard
from finetune.data.packing import Counts, TokenRows, packed
from finetune.data.rows import DECIDING, Rows
from finetune.errors import SettingsError
from finetune.files import sha256
from finetune.settings import Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pyarrow import RecordBatch
    from transformers import PreTrainedTokenizerBase

LENGTHS = "lengths.npy"

SAMPLE = 1000  # rows on which another way to read the tokenizer is tried
CHUNK = 500  # rows given to a process at a time


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The data set that is trained on. Columns input_ids and labels, lists of ints; IGNORE_INDEX where there is no loss.

    lengths: tokens of each row, int32. trained: tokens that the loss is on. largest: the highest id. common: length of the shared
    prefix: the tokens, with equal labels, at the start of every row (a template's beginning, a system prompt). dropped: rows that
    cannot be trained on. day, writes_day: what the chat template takes for today, and whether it writes it. notes: sentences on what
    is not trained letter for letter.
    sha256: of all ids and labels in order. It covers rows, template, tokenizer and length limit at once.
    """

    dataset: TokenRows
    truncated: int
    lengths: NDArray[Any]
    largest: int
    common: int
    trained: int
    dropped: int
    day: datetime.date
    writes_day: bool
    notes: list[str]
    sha256: str

    def record(self) -> dict[str, Any]:
        """What run.json says of the tokens."""
        return dict(
            trained=len(self.dataset),
            truncated=self.truncated,
            longest=self.longest,
            common=self.common,
            tokens=self.total,
            tokens_trained=self.trained,
            tokens_sha256=self.sha256,
            date=self.date,
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    @property
    def total(self) -> int:
        """Tokens of all rows."""
        return int(self.lengths.sum(dtype="int64"))

    @property
    def date(self) -> str | None:
        """The date that the chat template writes into each row; None: it writes none."""
        return self.day.isoformat() if self.writes_day else None

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
        """The first rows' texts, as they are trained."""
        for ids in self.dataset[:SAMPLE]["input_ids"]:
            yield tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)

    def first(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The first row as it is trained, with the trained part marked."""
        row = self.dataset[0]
        return shown.row(tokenizer, row["input_ids"], row["labels"])

    def describe(self, dropped: int) -> str:
        """Lines for the console. dropped: rows that were left out before."""
        line = (
            f"{len(self.dataset)} rows, {self.trained:,} of {self.total:,} tokens are trained, the longest row has {self.longest}, the "
            f"first {self.common} are the same in every row, {self.truncated} truncated, {dropped + self.dropped} dropped"
        )
        return "\n".join(f"data: {each}" for each in (line, *self.notes))


def format_of(name: str, tokenizer: PreTrainedTokenizerBase, settings: Settings, day: datetime.date) -> Format:
    """The format of rows by its name. day: what a chat template that writes today's date is to write."""
    return FORMATS[name].of(settings, tokenizer, day)


def tokenize(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings, date: datetime.date | None = None, own_file: bool = True
) -> Tokens:  # fmt: skip
    """Texts to tokens, in the order of the rows whatever DATASET_NUM_PROC is. They go into a store, and are read from it.

    Exactly one BOS where the tokenizer uses one, and one EOS, which is trained on, at the end of each row; a row longer
    than MAX_SEQ_LENGTH loses what stands before its EOS, so that the model still learns to stop.

    date: what a chat template writes as today's; None: today. own_file: whether the tokenizer has a tokenizer.json. Raises
    SettingsError that names rows which lose something or keep nothing to train on, or where messages find no chat template;
    MachineError where a process was killed.
    """
    date = date or datetime.date.today()
    made = format_of(rows.format, tokenizer, settings, date)
    encoder = Encoder(
        made, tokenizer, Guard.of(tokenizer, own_file), settings.max_seq_length, settings.train_on != "all"
    )
    key = dict(
        rows=rows.key,
        chosen=rows.chosen,
        tokenizer=_identity(tokenizer, own_file),
        day=date if made.writes_day else None,
        settings={name: getattr(settings, name) for name in DECIDING if name != "dataset_name"},
        template=sha256(Path(settings.template_file).expanduser()) if settings.template_file else None,
    )
    with store.opened("tokens", key) as opened:
        if opened.done is None:
            opened = _Tokenized(rows, encoder, settings, opened).stored()
        assert opened.done is not None
        said = opened.done
        return Tokens(
            dataset=TokenRows(opened.rows(mapped=True)),
            lengths=numpy.load(opened.folder / LENGTHS),
            day=date,
            writes_day=made.writes_day,
            notes=[
                f"{said['flags'][flag]} rows {what} (the first is {rows.place(said['first_row'][flag])})"
                for flag, what in FLAGS.items()
                if said["flags"][flag]
            ],
            truncated=said["flags"]["truncated"],
            **{name: said[name] for name in ("largest", "common", "trained", "dropped", "sha256")},
        )


def _identity(tokenizer: PreTrainedTokenizerBase, own_file: bool) -> list[Any]:
    """What tells a tokenizer from others, and the libraries' versions."""
    versions = [importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")]
    parts = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template, type(tokenizer).__name__)
    return [parts, [str(name) for name in named], own_file, versions]


class _Tokenized:
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
                self.told += [f"{self.rows.place(number)}: {why}" for number, why in bad[: SHOWN - len(self.told)]]
                self.counts.add(batch)
                progress.add(stop - start)
                if batch.num_rows:
                    yield batch, dict(read=self.read, bad=self.bad, told=self.told)

    def _piece(self, piece: tuple[int, int]) -> tuple[RecordBatch, list[tuple[int, str]]]:
        """The tokens of some rows, and what is wrong with those that cannot be trained on."""
        numbers = [self.rows.number(index) for index in range(*piece)]
        made = self.encoder.many(self.rows.some(numbers))
        bad = [(number, row["problem"]) for number, row in zip(numbers, made, strict=True) if row["problem"]]
        good = [(number, row) for number, row in zip(numbers, made, strict=True) if not row["problem"]]
        return packed([row for _, row in good], [number for number, _ in good]), bad
