"""Nothing that a row says may be lost on its way into tokens: the tokens are decoded and compared with their text."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import TYPE_CHECKING, Any

from finetune.data.formats.base import BadRow, any_of
from finetune.data.tokenizer_files import made_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Guard:
    """Compares tokens with text. separator: finds the texts of added tokens, around which tokenizers may add or take white space."""

    backend: Any
    separator: re.Pattern[str]
    own_file: bool  # the ids are those of a tokenizer.json, so what it drops, the model never saw

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Guard:
        """The guard for a tokenizer."""
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        # sentencepiece's \u2581 is a space
        texts = sorted((text for text in added if text.replace("\u2581", " ").strip()), key=len, reverse=True)
        files = made_of(tokenizer)
        return cls(tokenizer.backend_tokenizer, any_of(texts), not files or "tokenizer.json" in files)

    def compare(self, text: str, decoded: str, cut: bool) -> bool:
        """Whether the tokenizer wrote some of the text in another way (a normalizer, white space it does not know), losing no letter.

        decoded: what its tokens say, special ones too. cut: they hold only the beginning of the text. Raises BadRow that shows what was lost.
        """
        if decoded == text:
            return False
        wanted, found = self._segments(text), self._segments(decoded)
        if _same(wanted, found, cut):
            return False
        wanted, found = [self._normal(segment) for segment in wanted], [_spaced(segment) for segment in found]
        if _same(wanted, found, cut):
            return True
        bare = functools.partial(re.sub, r"\s+", "")
        if self.own_file and _same([*map(bare, wanted)], [*map(bare, found)], cut):
            return True
        raise BadRow(f"would lose text in its tokens: {_difference(wanted, found)}")

    def _segments(self, text: str) -> list[str]:
        return [segment for part in self.separator.split(text) if (segment := part.strip())]

    def _normal(self, text: str) -> str:
        normalizer = self.backend.normalizer
        return _spaced(str(normalizer.normalize_str(text)) if normalizer else text)


def _spaced(text: str) -> str:
    return text.replace("\u2581", " ").strip()


def _same(wanted: list[str], found: list[str], cut: bool) -> bool:
    if not cut or wanted == found:
        return wanted == found
    if not found:
        return True
    last = found[-1].rstrip("\ufffd").rstrip()  # the cut may go through a letter of several bytes
    count = len(found) - 1
    return wanted[:count] == found[:count] and (not last or (count < len(wanted) and wanted[count].startswith(last)))


def _difference(wanted: list[str], found: list[str]) -> str:
    """Where two texts part, in words."""
    one, other = next(
        ((a, b) for a, b in zip(wanted, found, strict=False) if a != b), ("".join(wanted[len(found) :]), "")
    )
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"{one[max(0, at - 10) : at + 30]!r} becomes {other[max(0, at - 10) : at + 30]!r}"
