"""The forms that rows have, one module each. A format makes a row's training text, and says which part of it is the answer."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # from a character to the one behind the last


class BadRow(Exception):
    """There is no training text in a row. Says why, in words that follow the row's place."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A row's training text, without the EOS at its end.

    answers: the spans that the model shall learn to write. literal: spans of special tokens' text that the row itself holds, and
    that are tokenized as ordinary text. marked: whether the row's own BOS or EOS was taken out at its ends.
    """

    text: str
    answers: list[Span]
    literal: list[Span] = dataclasses.field(default_factory=list)
    marked: bool = False


class Format(Protocol):
    """One form of rows."""

    def text(self, row: dict[str, Any]) -> Text:
        """The row's training text. Raises BadRow."""
        ...

    def prompt(self, question: str) -> str:
        """What the model is given to answer a question."""
        ...


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of the tokenizer's special tokens, the longest first."""
    named = [str(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token]
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({text for text in named + added if text.strip()}, key=lambda text: (-len(text), text))


def any_of(texts: list[str]) -> re.Pattern[str]:
    """A pattern that finds each of the texts; of two at one place the first in the list. Nothing where there are none."""
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")
