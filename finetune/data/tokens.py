"""Training text -> tokens, once for both engines, and which of them the loss is on."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from finetune import console
from finetune.data import processes, store
from finetune.data.formats import FORMATS, Format, template
from finetune.data.formats.base import BadRow, Span, Text, any_of, special_texts
from finetune.data.kept import Guard
from finetune.data.packing import IGNORE_INDEX, Counts, TokenRows, packed
from finetune.data.reading import Row
from finetune.data.rows import DECIDING, SHOWN, Rows, refuse
from finetune.errors import SettingsError
from finetune.settings import Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pyarrow import RecordBatch
    from transformers import PreTrainedTokenizerBase

LENGTHS = "lengths.npy"

SAMPLE = 1000  # rows on which another way to read the tokenizer is tried
CHUNK = 500  # rows given to a process at a time
SAID = {
    "marked": "end or begin with a BOS or EOS of their own, which is taken out; each row gets exactly one",
    "literal": "hold the text of special tokens, which is read as ordinary text",
    "rewritten": "hold letters or white space that the model's tokenizer writes in its own way",
}


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
        made, tokenizer, Guard.of(tokenizer, own_file), settings.max_seq_length, settings.train_on == "response"
    )
    key = dict(
        rows=rows.key,
        chosen=rows.chosen,
        tokenizer=_identity(tokenizer, own_file),
        day=date if made.writes_day else None,
        settings={name: getattr(settings, name) for name in DECIDING if name != "dataset_name"},
        template=template.template(settings).text if made.NAME == "columns" else None,
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
                for flag, what in SAID.items()
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


class Cut(NamedTuple):
    """Tokens of a text, within the limit. cut: whether they are not all. held, said: what is compared: tokens, and their text."""

    ids: list[int]
    offsets: list[Span]
    cut: bool
    said: str
    held: list[int]


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
        return self.many([row])[0]

    def many(self, rows: list[Row]) -> list[Row]:
        """The same of several rows, for which the tokenizer is called once: it takes much longer to call than to work."""
        empty = dict(input_ids=[], labels=[], truncated=False, marked=False, literal=False, rewritten=False)
        found = [self._text(row) for row in rows]
        made: list[Row] = [{**empty, "problem": "" if isinstance(text, Text) else str(text)} for text in found]
        good = [(index, text) for index, text in enumerate(found) if isinstance(text, Text)]
        cut = [
            self._cut(text, *tokens)
            for (_, text), tokens in zip(good, self._tokens([text for _, text in good]), strict=True)
        ]
        decoded = self.guard.backend.decode_batch([each.held for each in cut], skip_special_tokens=False)
        for (index, text), each, read in zip(good, cut, decoded, strict=True):
            try:
                made[index].update(self._labelled(text, each, read))
            except BadRow as bad:
                made[index] = {**empty, "problem": str(bad)}
        return made

    def _text(self, row: Row) -> Text | BadRow:
        try:
            return self.format.text(row)
        except BadRow as bad:
            return bad

    def _cut(self, text: Text, ids: list[int], offsets: list[Span]) -> Cut:
        """The tokens without the EOS that the text may end with, and not more than the limit with one."""
        (bos, bos_id), (eos, eos_id) = self._marks
        ended = ids[-1] == eos_id and not any(end == len(text.text) for _, end in text.literal)
        if ended:
            ids = ids[:-1]
        cut, ids = len(ids) + 1 > self.limit, ids[: self.limit - 1]
        # compared with the text without the BOS at the beginning and the EOS at the end
        said, held = text.text, ids
        if ids and ids[0] == bos_id:
            held = ids[1:]
            said = said.removeprefix(bos) if bos and not any(start == 0 for start, _ in text.literal) else said
        if ended:
            said = said.removesuffix(eos)
        return Cut(ids, offsets, cut, said, held)

    def _labelled(self, text: Text, made: Cut, decoded: str) -> Row:
        ids, eos = made.ids, self._marks[1][1]
        rewritten = self.guard.compare(made.said, decoded, made.cut)
        if self.response:
            trained = [_within(span, text.answers) for span in made.offsets[: len(ids)]]
            labels = [token if use else IGNORE_INDEX for token, use in zip(ids, trained, strict=True)]
            any_trained, last_trained = any(trained), bool(trained) and trained[-1]
        else:
            labels, any_trained, last_trained = ids, bool(ids), True
        if not any_trained:
            raise BadRow(
                f"has nothing left to train on, because its prompt alone is as long as MAX_SEQ_LENGTH={self.limit}; raise it, for "
                f"example MAX_SEQ_LENGTH={2 * self.limit}"
            )
        # if the cut is in a question, the EOS is not trained: it ends no answer
        last = eos if not made.cut or last_trained else IGNORE_INDEX
        return dict(
            input_ids=[*ids, eos], labels=[*labels, last], truncated=made.cut, marked=text.marked, literal=bool(text.literal),
            rewritten=rewritten,
        )  # fmt: skip

    def _tokens(self, texts: list[Text]) -> list[tuple[list[int], list[Span]]]:
        """Ids of each whole text, each id with the characters that it stands for; a BOS that is added stands for none."""
        found: list[Any] = [self._ids(text) if text.literal else None for text in texts]
        backend, offsets = self.tokenizer.backend_tokenizer, self.response
        backend.no_truncation()
        backend.no_padding()
        encode = (
            backend.encode_batch if offsets else backend.encode_batch_fast
        )  # which finds no offsets, and the same ids
        for begun in (False, True):
            which = [index for index, text in enumerate(texts) if not found[index] and self._begun(text) == begun]
            encoded = encode([texts[index].text for index in which], add_special_tokens=not begun) if which else []
            for index, each in zip(which, encoded, strict=True):
                found[index] = (each.ids, each.offsets if offsets else [])
        return found

    def _begun(self, text: Text) -> bool:
        """Whether a text has its BOS already."""
        bos = self._marks[0][0]
        return bool(bos) and text.text.startswith(bos) and not any(start == 0 for start, _ in text.literal)

    def _ids(self, text: Text) -> tuple[list[int], list[Span]]:
        """The same of one text that holds the text of special tokens."""
        begun = self._begun(text)
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
    def _marks(self) -> list[tuple[str, int | None]]:
        """BOS and EOS, each as text and id. transformers takes longer to look them up than to encode a short text."""
        words = self.tokenizer
        return [(str(words.bos_token or ""), words.bos_token_id), (str(words.eos_token), words.eos_token_id)]

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        return any_of(special_texts(self.tokenizer))

    @functools.cached_property
    def _eating(self) -> set[str]:
        """Tokens that take the white space after them, as Phi-3's."""
        return {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.rstrip}


def _within(token: Span, answers: list[Span]) -> bool:
    """Whether a token stands for something of an answer. A BOS that the tokenizer adds is at (0, 0).

    A token of white space may be empty, with both offsets at its end: GPT-NeoX's tokenizer trims them.
    """
    start, end = token
    return any(a < end and (start < b or start == end <= b) for a, b in answers)
