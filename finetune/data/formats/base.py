"""What every format of rows is, and what formats share."""

from __future__ import annotations

import dataclasses
import datetime
import re
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from finetune.data import checks
from finetune.errors import first_line
from finetune.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Span = tuple[int, int]  # from the first character to the one after the last

# What may be said of a row that is trained all the same, and how it is told of all such rows: "12 rows …".
FLAGS = {
    "marked": "end or begin with a BOS or EOS of their own, which is taken out; each row gets exactly one",
    "literal": "hold the text of special tokens, which is read as ordinary text",
    "meant": "hold special tokens, which are read as such, because the text is written as a chat template writes it",
    "rewritten": "hold letters or white space that the model's tokenizer writes in its own way",
    "as_json": "hold numbers, true or false (or a tool's result that is no text), which are trained as JSON writes them",
    "nulls": "hold null in tools or in the arguments of calls, which is left out, because Parquet writes it for what is not there",
    "muted": "have messages of weight 0, which are not trained",
    "unwritten": "have fields in their messages that are not trained, because the chat template does not write them, such as name",
    "wrapped": "hold reasoning that the model's chat template leaves out; it is written as <think>…</think> before its answer "
    "(KEEP_REASONING=template leaves it out)",
    "switched": "hold reasoning that the model's chat template leaves out of earlier turns unless it is told to keep it, as it "
    "was here (KEEP_REASONING=template leaves it out)",
    "thoughtless": "hold reasoning that is left out, as KEEP_REASONING says",
}


class BadRow(Exception):
    """There is no training text in a row. Says why, in words that follow the row's place."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A row's training text, without the EOS at its end.

    answers: the spans that the model should learn to write. untrained: spans without a loss whatever TRAIN_ON says. literal: spans of
    special tokens' text that the row itself holds, and that are tokenized as ordinary text. ends: whether the EOS at the end of the
    row ends something that is trained. said: those of FLAGS that hold.
    """

    text: str
    answers: list[Span]
    literal: list[Span] = dataclasses.field(default_factory=list)
    untrained: list[Span] = dataclasses.field(default_factory=list)
    ends: bool = True
    said: frozenset[str] = frozenset()


class Format(Protocol):
    """One form of rows: what is wrong with a row, its training text, which part of it is the answer, and how a question is asked."""

    NAME: ClassVar[str]  # in run.json, and the value of DATASET_FORMAT
    TOLD: ClassVar[str]  # what such a row has, in words

    @classmethod
    def recognises(cls, row: Row, settings: Settings) -> bool:
        """Whether rows such as the first one are of this form."""
        ...

    @classmethod
    def needs(cls, settings: Settings) -> tuple[str, ...]:
        """Columns that each row has to have."""
        ...

    @classmethod
    def reads(cls, settings: Settings) -> tuple[str, ...]:
        """Columns that are looked at where they are there."""
        ...

    @classmethod
    def problem(cls, row: Row, settings: Settings) -> str | None:
        """Why there is no training text in a row as it was read, in words that follow its place; None: there is."""
        ...

    @classmethod
    def check(cls, settings: Settings) -> None:
        """Raise SettingsError for settings that cannot be right, before a model is downloaded."""
        ...

    @classmethod
    def of(cls, settings: Settings, tokenizer: PreTrainedTokenizerBase, day: datetime.date) -> Format:
        """The format for a tokenizer. day: written as today's date. Raises SettingsError if the format cannot be made."""
        ...

    @property
    def writes_day(self) -> bool:
        """Whether a training text holds today's date."""
        ...

    def text(self, row: Row) -> Text:
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
    """A pattern that finds each of the texts; if two match at one place, the first in the list. Without texts it finds nothing."""
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def parsed(value: Any, what: str) -> Any:
    """As `checks.parsed`. what: the value in words, with is or are. Raises BadRow."""
    try:
        return checks.parsed(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what} not JSON ({first_line(error)})") from None


def said_text(value: Any, where: str, said: set[str]) -> str:
    """The text that is trained for a value. said: gets the flag of one that is no text. Raises BadRow."""
    if wrong := checks.bad_text(value):
        raise BadRow(f"{where} {wrong}")
    if checks.is_bare(value):
        said.add("as_json")
    return checks.text(value)


def short(text: str, most: int = 60) -> str:
    """The beginning of a text, on one line."""
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[:most] + " …"
