"""Training text -> tokens, once for both engines, and which of them the loss is on."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data import shown, store
from finetune.data.encoder import Encoder
from finetune.data.formats import FORMATS, Format
from finetune.data.formats.base import FLAGS
from finetune.data.held_out import HeldOut
from finetune.data.kept import Guard
from finetune.data.rows import TOKENIZING, Rows
from finetune.data.tokenizer_files import made_of
from finetune.files import sha256
from finetune.settings import Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from finetune.data.packing import TokenRows

SAMPLE = 1000  # rows on which another way to read the tokenizer is tried


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The data set that is trained on. Columns input_ids and labels, lists of ints; IGNORE_INDEX where there is no loss.

    lengths: tokens of each row, int32. trained: tokens that the loss is on. largest: the highest id. common: length of the shared
    prefix: the tokens, with equal labels, at the start of every row (a template's beginning, a system prompt). dropped: rows that
    cannot be trained on. day, writes_day: what the chat template takes for today, and whether it writes it. notes: sentences on what
    is not trained letter for letter.
    sha256: of all ids and labels in order. It covers rows, template, tokenizer and length limit at once. held_out: rows to measure on.
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
    held_out: HeldOut | None = None

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
        return shown.row(tokenizer, **self.dataset[0])

    def describe(self, dropped: int) -> str:
        """Lines for the console. dropped: rows that were left out before."""
        line = (
            f"{len(self.dataset)} rows, {self.trained:,} of {self.total:,} tokens are trained, the longest row has {self.longest}, the "
            f"first {self.common} are the same in every row, {self.truncated} truncated, {dropped + self.dropped} dropped"
        )
        lines = [f"data: {each}" for each in (line, *self.notes)]
        return "\n".join([*lines, self.held_out.describe()] if self.held_out else lines)


def format_of(name: str, tokenizer: PreTrainedTokenizerBase, settings: Settings, day: datetime.date) -> Format:
    """The format of rows by its name. day: what a chat template that writes today's date is to write."""
    return FORMATS[name].of(settings, tokenizer, day)


def tokenize(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings, date: datetime.date | None = None
) -> Tokens:
    """Texts to tokens, in the order of the rows whatever DATASET_NUM_PROC is. They go into a store, and are read from it.

    Exactly one BOS where the tokenizer uses one, and one EOS, which is trained on, at the end of each row; a row longer
    than MAX_SEQ_LENGTH loses what stands before its EOS, so that the model still learns to stop.

    date: what a chat template writes as today's; None: today. Raises SettingsError that names rows which lose something or keep
    nothing to train on, or where messages find no chat template; MachineError where a process was killed.
    """
    date = date or datetime.date.today()
    work = encoder(rows.format, tokenizer, settings, date)
    key = dict(
        version=store.version(),
        rows=[rows.sha256, len(rows), rows.format],
        tokenizer=_identity(tokenizer),
        day=date if work.format.writes_day else None,
        settings={name: getattr(settings, name) for name in TOKENIZING},
        template=sha256(Path(settings.template_file).expanduser()) if settings.template_file else None,
    )
    from finetune.data import held_tokens, tokenized  # numpy takes a tenth of a second, and `check` needs none

    dataset, lengths, said, folder = tokenized.tokenized(rows, work, settings, key)
    held_out = None
    if rows.held is not None:
        own = dataclasses.replace(work, format=format_of(rows.held.format or rows.format, tokenizer, settings, date))
        known = functools.partial(held_tokens.known, trained=dataset, common=said["common"], folder=folder)
        held_out = held_tokens.encoded(rows.held, own, known, settings)
    return Tokens(
        dataset=dataset,
        lengths=lengths,
        day=date,
        writes_day=work.format.writes_day,
        notes=[
            f"{said['flags'][flag]} rows {what} (the first is {rows.places[said['first_row'][flag]]})"
            for flag, what in FLAGS.items()
            if said["flags"][flag]
        ],
        truncated=said["flags"]["truncated"],
        held_out=held_out,
        **{name: said[name] for name in ("largest", "common", "trained", "dropped", "sha256")},
    )


def encoder(form: str, tokenizer: PreTrainedTokenizerBase, settings: Settings, date: datetime.date) -> Encoder:
    """What makes the tokens of a row. form: its name; the others are those of `tokenize`."""
    made = format_of(form, tokenizer, settings, date)
    return Encoder(made, tokenizer, Guard.of(tokenizer), settings.max_seq_length, settings.train_on != "all")


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What tells a tokenizer from others, and the libraries' versions."""
    versions = [importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")]
    # its files tell in a moment what takes half a second to write out
    parts = made_of(tokenizer) or hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template, type(tokenizer).__name__)
    return [parts, [str(name) for name in named], versions]
