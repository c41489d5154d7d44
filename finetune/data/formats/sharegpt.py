"""Rows with `conversations`, each message with `from` and `value`: ShareGPT, and LLaMA-Factory's columns system and tools."""

from __future__ import annotations

from typing import ClassVar

from finetune.data.formats.base import Row
from finetune.data.formats.chat import Chatting
from finetune.data.formats.messages import BESIDE, PICTURES, beside
from finetune.data.formats.turns import Conversation, conversation
from finetune.settings import Settings

COLUMNS = ("conversations", "conversation")  # LMSYS' chats have the second


class ShareGPT(Chatting):
    """The format of rows with conversations."""

    NAME: ClassVar[str] = "sharegpt"
    TOLD: ClassVar[str] = "a list of conversations"

    @classmethod
    def recognises(cls, row: Row, settings: Settings) -> bool:
        """By the name of the column."""
        return any(name in row for name in COLUMNS)

    @classmethod
    def needs(cls, settings: Settings) -> tuple[str, ...]:
        """The list of messages, under either of its names."""
        return ("conversations",)

    @classmethod
    def reads(cls, settings: Settings) -> tuple[str, ...]:
        """What may stand beside it, too."""
        return (*COLUMNS, *BESIDE, *PICTURES)

    @classmethod
    def conversation(cls, row: Row) -> Conversation:
        """The row's messages."""
        column = next((name for name in COLUMNS if row.get(name)), COLUMNS[0])
        return conversation(row.get(column), column, **beside(row))
