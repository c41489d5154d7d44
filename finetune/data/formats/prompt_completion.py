"""Rows with `prompt` and `completion`, as trl has them: two texts, or two lists of messages."""

from __future__ import annotations

from typing import ClassVar

from finetune.data import checks
from finetune.data.formats.base import Row, Text
from finetune.data.formats.chat import Chatting
from finetune.data.formats.filled import Filled
from finetune.data.formats.messages import BESIDE, PICTURES, beside
from finetune.data.formats.turns import Conversation, conversation
from finetune.settings import Settings

COLUMNS = ("prompt", "completion")


class Pair:
    """The columns of both forms."""

    @classmethod
    def needs(cls, settings: Settings) -> tuple[str, ...]:
        """The two columns."""
        return COLUMNS

    @classmethod
    def reads(cls, settings: Settings) -> tuple[str, ...]:
        """Also what may stand beside messages, but not beside text."""
        return (*COLUMNS, *BESIDE, *PICTURES)


class PromptCompletionChat(Pair, Chatting):
    """The format of a prompt and a completion that are messages. Those of the prompt are no answers."""

    NAME: ClassVar[str] = "prompt_completion_chat"
    TOLD: ClassVar[str] = "prompt and completion as lists of messages"

    @classmethod
    def recognises(cls, row: Row, settings: Settings) -> bool:
        """By the names of the columns, and a list in one of them."""
        return all(column in row for column in COLUMNS) and any(isinstance(row[column], list) for column in COLUMNS)

    @classmethod
    def conversation(cls, row: Row) -> Conversation:
        """All messages."""
        return conversation(row.get("completion"), "completion", asked=row.get("prompt") or [], **beside(row))


class PromptCompletion(Pair, Filled):
    """The format of a prompt and a completion that are texts."""

    NAME: ClassVar[str] = "prompt_completion"
    TOLD: ClassVar[str] = "prompt and completion"

    @classmethod
    def recognises(cls, row: Row, settings: Settings) -> bool:
        """By the names of the columns."""
        return all(column in row for column in COLUMNS)

    @classmethod
    def problem(cls, row: Row, settings: Settings) -> str | None:
        """Both are text; a prompt may be empty."""
        for column in COLUMNS:
            if column == "prompt" and row.get(column) == "":
                continue
            if wrong := checks.bad_text(row.get(column)):
                chat = "; messages are of form prompt_completion_chat" if isinstance(row.get(column), list) else ""
                return f"column {column} {wrong}{chat}"
        if said := next((name for name in (*BESIDE, *PICTURES) if not checks.empty(row.get(name))), None):
            return f"has {said} beside a prompt that is text, which has no place for it"
        return None

    @classmethod
    def check(cls, settings: Settings) -> None:
        """There is nothing to check."""

    def text(self, row: Row) -> Text:
        """Two texts one after the other, with nothing between."""
        prompt, completion = row["prompt"], row["completion"]
        said = {"as_json"} if checks.is_bare(prompt) or checks.is_bare(completion) else set()
        return self.filler.text([("", checks.text(prompt)), ("", None), ("", checks.text(completion))], said)

    def prompt(self, question: str) -> str:
        """The question as it is."""
        return question
