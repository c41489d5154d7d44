"""A text with the values of a row in its places. What is special in the text is meant; in the values it is ordinary text."""

from __future__ import annotations

import dataclasses
import datetime
import re
from typing import TYPE_CHECKING, Self

from finetune.data.formats.base import BadRow, Span, Text, any_of, special_texts
from finetune.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Filler:
    """special: finds special tokens' texts. bos, eos: the tokenizer's; "" where it has none."""

    special: re.Pattern[str]
    bos: str
    eos: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Filler:
        """What a tokenizer's special tokens are called."""
        return cls(any_of(special_texts(tokenizer)), str(tokenizer.bos_token or ""), str(tokenizer.eos_token or ""))

    def text(self, parts: list[tuple[str, str | None]], said: set[str] | None = None) -> Text:
        """The parts one after the other, each a text and the value that follows it. The answer begins after the value None."""
        text, answer, places = "", 0, list[Span]()
        values = [value for _, value in parts if value is not None]
        trimmed = self.trimmed(values)
        following = iter(trimmed)
        for before, value in parts:
            text += before
            if value is None:
                answer = len(text)
                continue
            filled = next(following)
            places.append((len(text), len(text) + len(filled)))
            text += filled
        flags = {*(said or ()), *({"marked"} if trimmed != values else ())}
        return Text(text, [(answer, len(text))], self.literal(text, places), said=frozenset(flags))

    def literal(self, text: str, places: list[Span]) -> list[Span]:
        """Where special tokens' texts stand in the values."""
        return [
            (start + found.start(), start + found.end())
            for start, end in places
            for found in self.special.finditer(text[start:end])
        ]

    def trimmed(self, values: list[str]) -> list[str]:
        """The values without a BOS at the beginning of the first, and an EOS at the end of the last: each row gets one of its own."""
        made = [self.without_bos(values[0]), *values[1:]]
        made[-1] = self.without_eos(made[-1])
        for value, was in ((made[0], values[0]), (made[-1], values[-1])):
            if was.strip() and not value.strip():
                raise BadRow(f"has a text that holds nothing but {was.strip()}")
        return made

    # Remove BOS and EOS that people write at the ends of a row. But not if the value holds both: `<s>` and `</s>` are HTML too.

    def without_bos(self, value: str) -> str:
        """A value without the BOS at its beginning."""
        html = bool(self.eos) and self.eos in value
        return value if not self.bos or html else value.removeprefix(self.bos)

    def without_eos(self, value: str) -> str:
        """A value without the EOS at its end."""
        html = bool(self.bos) and self.bos in value
        ended = bool(self.eos) and value.rstrip().endswith(self.eos)
        return value.rstrip().removesuffix(self.eos) if ended and not html else value


@dataclasses.dataclass(frozen=True)
class Filled:
    """What the formats share that need nothing but a filler: they write no date."""

    filler: Filler

    @classmethod
    def of(cls, settings: Settings, tokenizer: PreTrainedTokenizerBase, day: datetime.date) -> Self:
        """The format for a tokenizer."""
        return cls(Filler.of(tokenizer))

    @property
    def writes_day(self) -> bool:
        """Never."""
        return False
