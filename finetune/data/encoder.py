"""The text of a row -> its tokens, and which of them the loss is on. Nothing is lost on the way, or the row is refused."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.data.formats import Format
from finetune.data.formats.base import FLAGS, BadRow, Span, Text, any_of, special_texts
from finetune.data.kept import Guard
from finetune.data.reading import Row
from finetune.data.shown import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        empty = dict(input_ids=[], labels=[], truncated=False, **dict.fromkeys(FLAGS, False))
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
        if self.response or text.untrained:
            trained = [
                (not self.response or _within(span, text.answers)) and not _within(span, text.untrained)
                for span in made.offsets[: len(ids)]
            ]
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
        last = eos if (last_trained if made.cut else text.ends) else IGNORE_INDEX
        said = {*text.said, *({"literal"} if text.literal else ()), *({"rewritten"} if rewritten else ())}
        flags = {name: name in said for name in FLAGS}
        return dict(input_ids=[*ids, eos], labels=[*labels, last], truncated=made.cut, **flags)

    def _tokens(self, texts: list[Text]) -> list[tuple[list[int], list[Span]]]:
        """Ids of each whole text, each id with the characters that it stands for; a BOS that is added stands for none."""
        found: list[Any] = [self._ids(text) if text.literal else None for text in texts]
        backend = self.tokenizer.backend_tokenizer
        offsets = self.response or any(text.untrained for text in texts)
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
