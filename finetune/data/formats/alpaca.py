"""Rows with `instruction` and `output`, as Alpaca has them: through the chat template, or in Alpaca's own text."""

from __future__ import annotations

import dataclasses
import datetime
from typing import TYPE_CHECKING, Any, ClassVar

from finetune.data import checks
from finetune.data.formats.base import BadRow, Row, Text, parsed, said_text
from finetune.data.formats.chat import Chatting
from finetune.data.formats.filled import Filler
from finetune.data.formats.messages import PICTURES, beside
from finetune.data.formats.turns import Conversation, conversation
from finetune.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
WITHOUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


class Alpaca(Chatting):
    """The format of Alpaca's rows. As LLaMA-Factory has them: input is a second line of the question; history comes before it."""

    NAME: ClassVar[str] = "alpaca"
    TOLD: ClassVar[str] = "instruction and output"

    @classmethod
    def recognises(cls, row: Row, settings: Settings) -> bool:
        """By the names of the columns."""
        return "instruction" in row and "output" in row

    @classmethod
    def needs(cls, settings: Settings) -> tuple[str, ...]:
        """The columns that each row has."""
        return ("instruction", "output")

    @classmethod
    def reads(cls, settings: Settings) -> tuple[str, ...]:
        """The columns that it may have too."""
        return ("instruction", "input", "output", "system", "history", "tools", "functions", *PICTURES)

    @classmethod
    def conversation(cls, row: Row) -> Conversation:
        """History, question and answer as turns."""
        turns: list[dict[str, Any]] = []
        said: set[str] = set()
        for number, pair in enumerate(_history(row), 1):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise BadRow(f'history {number} is no pair; it takes [["question", "answer"], …]')
            turns += [{"role": "user", "content": said_text(pair[0], f"question of history {number}", said)}]
            turns += [{"role": "assistant", "content": said_text(pair[1], f"answer of history {number}", said)}]
        question, answer = _question(row, said), said_text(row.get("output"), "column output", said)
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        found = conversation(turns, "history", **beside(row))
        return dataclasses.replace(found, said=found.said | said)

    @classmethod
    def of(cls, settings: Settings, tokenizer: PreTrainedTokenizerBase, day: datetime.date) -> Alpaca:
        """Through the chat template where there is one, else in Alpaca's own text; PROMPT_TEMPLATE says which of the two."""
        if settings.prompt_template == "alpaca" or (settings.prompt_template is None and not tokenizer.chat_template):
            return Classic(Filler.of(tokenizer))
        return super().of(settings, tokenizer, day)


class Classic(Alpaca):
    """Alpaca's own text."""

    def __init__(self, filler: Filler):
        self.filler = filler

    @property
    def writes_day(self) -> bool:
        """Never."""
        return False

    def text(self, row: Row) -> Text:
        """Stanford's text with the row's values; a system prompt stands before it, as axolotl has it."""
        if more := next((name for name in ("history", "tools", "functions") if not checks.empty(row.get(name))), None):
            raise BadRow(
                f"has {more}, for which Alpaca's text has no place; a chat template has one (PROMPT_TEMPLATE=chat)"
            )
        beside(row)
        parts: list[tuple[str, str | None]] = []
        said: set[str] = set()
        if not checks.empty(row.get("system")):
            parts.append(("### System:\n", said_text(row["system"], "column system", said)))
            opening = "\n\n"
        else:
            opening = WITHOUT if checks.empty(row.get("input")) else WITH_INPUT
        parts.append((opening + "### Instruction:\n", said_text(row.get("instruction"), "column instruction", said)))
        if not checks.empty(row.get("input")):
            parts.append(("\n\n### Input:\n", said_text(row["input"], "column input", said)))
        parts += [("\n\n### Response:", None), ("\n", said_text(row.get("output"), "column output", said))]
        return self.filler.text(parts, said)

    def prompt(self, question: str) -> str:
        """The text without an input, up to its answer."""
        return f"{WITHOUT}### Instruction:\n{question}\n\n### Response:"


def _question(row: Row, said: set[str]) -> str:
    """Instruction and input, the second on a line of its own; one of them may be empty."""
    asked = [column for column in ("instruction", "input") if not checks.empty(row.get(column))] or ["instruction"]
    return "\n".join(said_text(row.get(column), f"column {column}", said) for column in asked)


def _history(row: Row) -> list[Any]:
    found = parsed(row.get("history"), "history is")
    if checks.empty(found):
        return []
    return found if isinstance(found, list) else [found]
