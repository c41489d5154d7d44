"""Rows with `messages`, as OpenAI and trl have them."""

from __future__ import annotations

from typing import ClassVar

from finetune.data.checks import empty
from finetune.data.formats.base import BadRow, Row
from finetune.data.formats.chat import Chatting
from finetune.data.formats.turns import Conversation, conversation
from finetune.settings import Settings

BESIDE = ("system", "tools", "functions", "chat_template_kwargs")  # what may stand beside the messages, and is trained
PICTURES = ("image", "images", "video", "videos", "audio", "audios")


def beside(row: Row) -> dict[str, object]:
    """What stands beside a row's messages. Raises BadRow for what this program cannot train."""
    if seen := next((name for name in PICTURES if not empty(row.get(name))), None):
        raise BadRow(f"has {seen} beside its text; this program trains text alone")
    if not empty(row.get("tools")) and not empty(row.get("functions")):
        raise BadRow("has tools and functions; it takes one of them")
    tools = row.get("tools") if empty(row.get("functions")) else row.get("functions")
    return dict(system=row.get("system"), tools=tools, options=row.get("chat_template_kwargs"))


class Messages(Chatting):
    """The format of rows with messages."""

    NAME: ClassVar[str] = "messages"
    TOLD: ClassVar[str] = "a list of messages"

    @classmethod
    def recognises(cls, row: Row, settings: Settings) -> bool:
        """By the name of the column."""
        return "messages" in row

    @classmethod
    def needs(cls, settings: Settings) -> tuple[str, ...]:
        """The list of messages."""
        return ("messages",)

    @classmethod
    def reads(cls, settings: Settings) -> tuple[str, ...]:
        """What may stand beside it, too."""
        return ("messages", *BESIDE, *PICTURES)

    @classmethod
    def conversation(cls, row: Row) -> Conversation:
        """The row's messages."""
        return conversation(row.get("messages"), "messages", **beside(row))
