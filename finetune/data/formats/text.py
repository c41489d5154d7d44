"""Rows with a column `text`, which is trained as it is."""

from __future__ import annotations

import re
from typing import ClassVar

from finetune.data import checks
from finetune.data.formats.base import BadRow, Row, Text
from finetune.data.formats.filled import Filled
from finetune.errors import SettingsError
from finetune.settings import Settings


class PlainText(Filled):
    """The format of plain text."""

    NAME: ClassVar[str] = "text"
    TOLD: ClassVar[str] = "text"

    @classmethod
    def recognises(cls, row: Row, settings: Settings) -> bool:
        """By the name of the column."""
        return "text" in row

    @classmethod
    def needs(cls, settings: Settings) -> tuple[str, ...]:
        """The column."""
        return ("text",)

    @classmethod
    def reads(cls, settings: Settings) -> tuple[str, ...]:
        """No other."""
        return ("text",)

    @classmethod
    def problem(cls, row: Row, settings: Settings) -> str | None:
        """It has to be text."""
        wrong = checks.bad_text(row.get("text"))
        return f"column text {wrong}" if wrong else None

    @classmethod
    def check(cls, settings: Settings) -> None:
        """There is no answer in a plain text."""
        if settings.train_on != "all":
            raise SettingsError(
                f"TRAIN_ON={settings.train_on}: rows of plain text have no answer to train on; use TRAIN_ON=all, or rows of "
                "another form (prompt and completion, messages)"
            )

    def text(self, row: Row) -> Text:
        """The text. Special tokens in it are ordinary text, unless it is written as a chat template writes it, as trl reads it."""
        value = checks.text(row["text"])
        said = {"as_json"} if checks.is_bare(row["text"]) else set()
        if not self._rendered(value):
            return self.filler.text([("", None), ("", value)], said)
        kept = value.rstrip()
        kept = kept if kept.endswith(self.filler.eos) else value
        if not kept.removesuffix(self.filler.eos).strip():
            raise BadRow("column text holds nothing but special tokens")
        return Text(kept, [(0, len(kept))], said=frozenset({*said, "meant"}))

    def _rendered(self, value: str) -> bool:
        """Whether a text holds special tokens other than BOS and EOS, which are HTML too, or an EOS right before a BOS."""
        bos, eos = self.filler.bos, self.filler.eos
        if any(found[0] not in (bos, eos) for found in self.filler.special.finditer(value)):
            return True
        return bool(bos and eos and re.search(rf"{re.escape(eos)}\s*{re.escape(bos)}", value))

    def prompt(self, question: str) -> str:
        """The question as it is."""
        return question
