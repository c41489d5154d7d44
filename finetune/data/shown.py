"""A row as it is trained, for people: its text, with the trained part between ‹ and ›."""

from __future__ import annotations

import itertools
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # label that the loss leaves out
LONGEST = 1600  # characters that are shown of a row
OPEN, CLOSE = "‹", "›"


def row(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], labels: list[int]) -> str:
    """The text of a row's tokens, with the trained part marked, and what a terminal would obey written as its code."""
    ids, decode = input_ids, tokenizer.backend_tokenizer.decode
    whole, text, start, inside = decode(ids, skip_special_tokens=False), "", 0, False
    borders = [at for at in range(1, len(ids)) if (labels[at] == IGNORE_INDEX) != (labels[at - 1] == IGNORE_INDEX)]
    for first, last in itertools.pairwise([0, *borders, len(ids)]):
        inside = labels[first] != IGNORE_INDEX
        end = len(decode(ids[:last], skip_special_tokens=False)) if last < len(ids) else len(whole)
        part = whole[start:end]
        text, start = text + (f"{OPEN}{part}{CLOSE}" if inside else part), end
    return _short("".join(letter if _harmless(letter) else letter.encode("unicode_escape").decode() for letter in text))


def told(text: str) -> str:
    """Lines for the console: the first row as it is trained."""
    return (
        f"data: the first row as it is trained (the loss is on what stands between {OPEN} and {CLOSE}):\n{lines(text)}"
    )


def lines(text: str) -> str:
    """A row's text, set apart from what else is printed."""
    return "\n".join(f"  | {line}" for line in text.splitlines())


def _harmless(letter: str) -> bool:
    """Whether a letter only shows itself: no control, no direction of writing."""
    return letter == "\n" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _short(text: str) -> str:
    """A long text without its middle."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"
