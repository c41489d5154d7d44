"""Training text -> tokens, once for both engines, and which of them the loss is on."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import itertools
import re
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finetune.data import processes
from finetune.data.formats import FORMATS, Format
from finetune.data.formats.base import BadRow, Span, Text, any_of, special_texts
from finetune.data.held_out import HeldOut
from finetune.data.kept import Guard
from finetune.data.reading import Row
from finetune.data.rows import Held, Rows, refuse
from finetune.errors import SettingsError
from finetune.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # label that the loss leaves out
SAMPLE = 1000  # rows on which another way to read the tokenizer is tried


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The data set that is trained on. Columns input_ids and labels, lists of ints; IGNORE_INDEX where there is no loss.

    lengths: tokens of each row. trained: tokens that the loss is on. largest: the highest id. common: length of the shared prefix:
    the tokens, with equal labels, at the start of every row (a template's beginning, a system prompt). dropped: rows that cannot
    be trained on. day, writes_day: what the chat template takes for today, and whether it writes it. notes: sentences on what is not
    trained letter for letter.
    sha256: of all ids and labels in order. It covers rows, template, tokenizer and length limit at once. held_out: rows to measure on.
    """

    dataset: Dataset
    truncated: int
    lengths: list[int]
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
        return max(self.lengths)

    @property
    def total(self) -> int:
        """Tokens of all rows."""
        return sum(self.lengths)

    @property
    def date(self) -> str | None:
        """The date that the chat template writes into each row; None: it writes none."""
        return self.day.isoformat() if self.writes_day else None

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
        """The first rows' texts, as they are trained."""
        for ids in self.dataset.select(range(min(SAMPLE, len(self.dataset))))["input_ids"]:
            yield tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)

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
    rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings, date: datetime.date | None = None, own_file: bool = True
) -> Tokens:  # fmt: skip
    """Texts to tokens, in the order of the rows whatever DATASET_NUM_PROC is.

    Exactly one BOS where the tokenizer uses one, and one EOS, which is trained on, at the end of each row; a row longer
    than MAX_SEQ_LENGTH loses what stands before its EOS, so that the model still learns to stop.

    date: what a chat template writes as today's; None: today. own_file: whether the tokenizer has a tokenizer.json. Raises
    SettingsError that names rows which lose something or keep nothing to train on, or where messages find no chat template;
    MachineError where a process was killed.
    """
    date = date or datetime.date.today()
    made = format_of(rows.format, tokenizer, settings, date)
    work = Encoder(
        made, tokenizer, Guard.of(tokenizer, own_file), settings.max_seq_length, settings.train_on == "response"
    )
    mapped = processes.results(work, rows.rows, settings.dataset_num_proc)
    problems = mapped["problem"]
    bad = [f"{place}: {problem}" for place, problem in zip(rows.places, problems, strict=True) if problem]
    places = [place for place, problem in zip(rows.places, problems, strict=True) if not problem]
    refuse(bad, len(rows.rows), settings, "what a row says has to be trained")
    if len(bad) == len(rows.rows):
        raise SettingsError(f"DATASET_NAME={rows.name}: no row can be trained on; the first is {bad[0]}")
    if bad:
        mapped = mapped.select([index for index, problem in enumerate(problems) if not problem])
    lengths, largest, trained, digest, common = [], 0, 0, hashlib.sha256(), None
    for ids, labels in zip(mapped["input_ids"], mapped["labels"], strict=True):
        common = _same((ids, labels), common or (ids, labels))
        lengths.append(len(ids))
        largest = max(largest, *ids)
        trained += len(labels) - labels.count(IGNORE_INDEX)
        digest.update(struct.pack(f"<q{2 * len(ids)}i", len(ids), *ids, *labels))
    assert common is not None
    dataset = mapped.select_columns(["input_ids", "labels"])
    return Tokens(
        dataset=dataset,
        truncated=sum(mapped["truncated"]),
        lengths=lengths,
        largest=largest,
        common=len(common[0]),
        trained=trained,
        dropped=len(bad),
        day=date,
        writes_day=made.writes_day,
        notes=_notes(mapped, places),
        sha256=digest.hexdigest(),
        held_out=_held_out(rows.held, work, dataset, len(common[0]), settings, date) if rows.held else None,
    )


def _held_out(
    held: Held, work: Encoder, trained: Dataset, common: int, settings: Settings, date: datetime.date
) -> HeldOut:
    """Tokens of the rows that are held out, made as those of trained rows."""
    from finetune.data import held_tokens  # numpy takes a tenth of a second, and `check` needs none

    form = format_of(held.format, work.tokenizer, settings, date) if held.rows else work.format
    return held_tokens.encoded(held, form, dataclasses.replace(work, format=form), trained, common, settings)


def _notes(mapped: Dataset, places: list[str]) -> list[str]:
    """Sentences on rows that are not trained letter for letter."""
    said = {
        "marked": "end or begin with a BOS or EOS of their own, which is taken out; each row gets exactly one",
        "literal": "hold the text of special tokens, which is read as ordinary text",
        "rewritten": "hold letters or white space that the model's tokenizer writes in its own way",
    }
    found = []
    for name, what in said.items():
        where = [place for place, flag in zip(places, mapped[name], strict=True) if flag]
        if where:
            found.append(f"{len(where)} rows {what} (the first is {where[0]})")
    return found


def _same(row: tuple[list[int], list[int]], common: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    """As much of `common`, ids and labels, as the row begins with."""
    size = len(common[0])
    if (row[0][:size], row[1][:size]) == common:
        return common
    pairs = zip(zip(*row, strict=True), zip(*common, strict=True), strict=False)
    size = next((index for index, (one, other) in enumerate(pairs) if one != other), len(row[0]))
    return common[0][:size], common[1][:size]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Makes the tokens of one row. limit: tokens at most. response: whether the loss is on the answers alone."""

    format: Format
    tokenizer: PreTrainedTokenizerBase
    guard: Guard
    limit: int
    response: bool

    def __call__(self, row: Row) -> Row:
        """Columns input_ids and labels, and what there is to say of the row; problem: why it cannot be trained on, "" where it can."""
        empty = dict(input_ids=[], labels=[], truncated=False, marked=False, literal=False, rewritten=False)
        try:
            return {**empty, **self._encoded(self.format.text(row)), "problem": ""}
        except BadRow as bad:
            return {**empty, "problem": str(bad)}

    def _encoded(self, text: Text) -> Row:
        eos = self.tokenizer.eos_token_id
        ids, offsets = self._ids(text)
        ended = ids[-1] == eos and not any(end == len(text.text) for _, end in text.literal)
        if ended:
            ids, offsets = ids[:-1], offsets[:-1]
        cut = len(ids) + 1 > self.limit
        ids, offsets = ids[: self.limit - 1], offsets[: self.limit - 1]
        rewritten = self._held(text, ids, ended, cut)
        trained = [not self.response or _within(span, text.answers) for span in offsets]
        labels = [token if use else IGNORE_INDEX for token, use in zip(ids, trained, strict=True)]
        if not any(trained):
            raise BadRow(
                f"has nothing left to train on, because its prompt alone is as long as MAX_SEQ_LENGTH={self.limit}; raise it, for "
                f"example MAX_SEQ_LENGTH={2 * self.limit}"
            )
        # if the cut is in a question, the EOS is not trained: it ends no answer
        last = eos if not cut or trained[-1] else IGNORE_INDEX
        return dict(
            input_ids=[*ids, eos], labels=[*labels, last], truncated=cut, marked=text.marked, literal=bool(text.literal),
            rewritten=rewritten,
        )  # fmt: skip

    def _ids(self, text: Text) -> tuple[list[int], list[Span]]:
        """Ids of the whole text, each with the characters that it stands for; a BOS that is added stands for none."""
        bos = self.tokenizer.bos_token
        begun = bool(bos) and text.text.startswith(str(bos)) and not any(start == 0 for start, _ in text.literal)
        if not text.literal:
            encoded = self.tokenizer(text.text, add_special_tokens=not begun, return_offsets_mapping=True)
            return list(encoded["input_ids"]), list(encoded["offset_mapping"])
        added = [] if begun else [i for i in self.tokenizer("")["input_ids"] if i == self.tokenizer.bos_token_id]
        ids, offsets, backend = added, [(0, 0)] * len(added), self.tokenizer.backend_tokenizer
        borders = [0, *itertools.chain.from_iterable(self._ordinary(text)), len(text.text)]
        for number, (start, end) in enumerate(itertools.pairwise(borders)):
            backend.encode_special_tokens = bool(number % 2)  # in every other part they are ordinary text
            part = backend.encode(text.text[start:end], add_special_tokens=False)
            ids += part.ids
            offsets += [(start + first, start + last) for first, last in part.offsets]
        backend.encode_special_tokens = False
        return ids, offsets

    def _ordinary(self, text: Text) -> list[Span]:
        """Spans without special tokens, but with their text: from one special token to the next.

        Not the text alone: tokenizers such as Llama 2's put a space in front of each part.
        """
        found = [match.span() for match in self._special.finditer(text.text)]
        own = [(a, b) for a, b in found if not any(a < end and start < b for start, end in text.literal)]
        spans: dict[Span, None] = {}
        for start, end in text.literal:
            before = max(((b, a) for a, b in own if b <= start), default=(0, 0))
            begin = before[0]
            if text.text[before[1] : begin] in self._eating:
                begin += len(text.text[begin:start]) - len(text.text[begin:start].lstrip())
            spans[begin, min((a for a, _ in own if a >= end), default=len(text.text))] = None
        return list(spans)

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        return any_of(special_texts(self.tokenizer))

    @functools.cached_property
    def _eating(self) -> set[str]:
        """Tokens that take the white space after them, as Phi-3's."""
        return {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.rstrip}

    def _held(self, text: Text, ids: list[int], ended: bool, cut: bool) -> bool:
        """Compare the tokens with their text, both without the BOS at the beginning and the EOS at the end."""
        said, bos = text.text, str(self.tokenizer.bos_token or "")
        if ids and ids[0] == self.tokenizer.bos_token_id:
            ids = ids[1:]
            said = said.removeprefix(bos) if bos and not any(start == 0 for start, _ in text.literal) else said
        if ended:
            said = said.removesuffix(str(self.tokenizer.eos_token))
        return self.guard.check(said, ids, cut)


def _within(token: Span, answers: list[Span]) -> bool:
    """Whether a token stands for something of an answer. A BOS that the tokenizer adds is at (0, 0).

    A token of white space may be empty, with both offsets at its end: GPT-NeoX's tokenizer trims them.
    """
    start, end = token
    return any(a < end and (start < b or start == end <= b) for a, b in answers)
