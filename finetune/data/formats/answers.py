"""Which characters of a conversation are an answer: from what asks for it to its end token."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from finetune.data.formats.base import BadRow, Span
from finetune.data.formats.dialect import Dialect
from finetune.data.formats.marks import Layout
from finetune.data.formats.turns import Turn

OPENED = re.compile(r"<think>\s*$")  # how the prompt of a reasoning model ends; an answer need not begin with it


@dataclasses.dataclass(frozen=True)
class Answers:
    """One conversation as it is written. special: finds special tokens' texts.

    asks: what the template adds to ask for an answer. ends: the special tokens with which it ends one; "" where it has none.
    """

    dialect: Dialect
    special: re.Pattern[str]
    asks: str
    ends: str
    turns: list[Turn]
    tools: list[Any]
    options: dict[str, Any]
    layout: Layout

    def span(self, number: int) -> Span:
        """The span of one of the assistant's turns."""
        pairs, text = self.layout.found(), self.layout.text
        own = [span for piece, span in pairs if piece.turn == number]
        if own:
            start, end = min(own)[0], max(last for _, last in own)
            others = [span for piece, span in pairs if piece.turn != number]
            before = max((last for _, last in others if last <= start), default=0)
            after = min((first for first, _ in others if first >= end), default=len(text))
        else:  # it only calls tools, whose place is not known
            before = end = max((last for piece, (_, last) in pairs if piece.turn < number), default=0)
            after = start = min((first for piece, (first, _) in pairs if piece.turn > number), default=len(text))
        begin = self._begin(number, before, start)
        if self.turns[number].get("tool_calls") and (called := self._end_of_calls(number, end, after, bool(own))):
            return begin, called
        return begin, self._end(end, after)

    def _begin(self, number: int, before: int, start: int) -> int:
        """Where the answer begins. before: where what stands before it ends; start: its first known character."""
        text = self.layout.text
        asked = text.rfind(self.asks, before, start) if self.asks else -1
        if asked >= 0:
            return asked + len(self.asks)
        if number:
            # the template adds nothing to ask for an answer: then all that it writes before the turn asks for it
            asking = OPENED.sub("", self.dialect.write(self.turns[:number], self.tools, self.options, asking=True))
            if text.startswith(asking) and before <= len(asking) <= start:
                return len(asking)
        return start

    def _end_of_calls(self, number: int, end: int, after: int, known: bool) -> int | None:
        """Where a turn that calls tools ends. Raises BadRow where that cannot be told. known: whether its calls were found."""
        text = self.layout.text
        through = self.dialect.write(self.turns[: number + 1], self.tools, self.options).rstrip()
        if text.startswith(through) and len(through) >= end:
            return len(through)
        if self.ends and (at := text.find(self.ends, end, after)) >= 0:
            return at + len(self.ends)
        if not known:
            raise BadRow(f"the model's chat template hides where the tool calls of message {number + 1} end")
        return None

    def _end(self, end: int, after: int) -> int:
        """Where the end token of an answer ends. end: its last known character; after: where what follows it begins."""
        text = self.layout.text
        if not self.ends:  # GLM's answers end where the next turn begins, with its token
            space = len(text[end:after]) - len(text[end:after].lstrip())
            following = self.special.match(text, end + space, after)
            return following.end() if following else end
        ending = self.special.search(text, end, after)
        if ending and text.startswith(self.ends, ending.start()):
            return ending.start() + len(self.ends)
        return ending.end() if ending else end
