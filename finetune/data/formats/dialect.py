"""What a model's chat template takes, found out by trying it, and a conversation written by it."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import itertools
import json
import re
from typing import TYPE_CHECKING, Any

from finetune.data.formats.base import BadRow
from finetune.data.formats.turns import ASSISTANT, THOUGHTS, TOOL, USER, Turn
from finetune.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# with which templates are told to keep the reasoning of earlier turns (Qwen3.6, LFM2.5, Nemotron, GLM-4.7)
SWITCHES = {
    "preserve_thinking": True,
    "keep_thinking": True,
    "keep_past_thinking": True,
    "truncate_history_thinking": False,
    "clear_thinking": False,
}
OWN_THOUGHT = re.compile(r"<think>\s*(</think>\s*)?$")  # which a template writes where an answer holds none
ASKED = {"role": USER, "content": "QxaskedxQ"}


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a chat template is given what a conversation says.

    day: written as today's date. mapping: whether it takes the arguments of a call as an object, or as JSON in a text. bare: what it
    takes as content of a turn that only calls tools: None, "", or "absent". parts: whether it takes content only as a list of parts.
    thought: the field whose reasoning it writes; None: it writes none. tags: whether reasoning stands in <think> and </think>.
    """

    tokenizer: PreTrainedTokenizerBase
    day: datetime.date
    mapping: bool = True
    bare: str | None = None
    parts: bool = False
    thought: str | None = None
    tags: bool = True

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, day: datetime.date) -> Dialect:
        """The dialect of the tokenizer's chat template. What a template refuses to tell is taken as most templates have it."""
        found = cls(tokenizer, day)
        if not found._writes([ASKED], "QxaskedxQ"):
            found = dataclasses.replace(found, parts=True)
            found = found if found._writes([ASKED], "QxaskedxQ") else dataclasses.replace(found, parts=False)
        for key in THOUGHTS:
            told = dataclasses.replace(found, thought=key)
            if told._writes(
                [ASKED, {"role": ASSISTANT, "content": "QxsaidxQ", "reasoning_content": "QxthoughtxQ"}], "QxthoughtxQ"
            ):
                found = told
                break
        source = str(tokenizer.chat_template)
        tags = "</think>" in source or not re.search("reasoning|thinking", source)
        found = dataclasses.replace(found, tags=tags)
        function = {"name": "QxnamexQ", "arguments": {"QxkeyxQ": True}}
        call = {
            "id": "Qxcallid0",
            "type": "function",
            "function": function,
        }  # nine letters and digits, as Mistral wants
        turns: list[Turn] = [
            ASKED,
            {"role": ASSISTANT, "tool_calls": [call]},
            {"role": TOOL, "content": "QxresultxQ", "tool_call_id": "Qxcallid0", "name": "QxnamexQ"},
            {"role": ASSISTANT, "content": "QxsaidxQ"},
        ]
        for mapping, bare in itertools.product((True, False), (None, "", "absent")):
            told = dataclasses.replace(found, mapping=mapping, bare=bare)
            # `~` writes an object as Python does
            if told._writes(turns, "QxnamexQ", "QxkeyxQ", "QxresultxQ", "QxsaidxQ", but=str(function["arguments"])):
                return told
        return found

    def _writes(self, turns: list[Turn], *marks: str, but: str = "\x00") -> bool:
        """Whether the template takes the turns and writes all the marks, and not `but`."""
        try:
            text = self.write(turns)
        except BadRow:
            return False
        return all(mark in text for mark in marks) and but not in text

    def write(
        self,
        turns: list[Turn],
        tools: list[Any] | None = None,
        options: dict[str, Any] | None = None,
        asking: bool = False,
    ) -> str:
        """The conversation as the chat template writes it. Raises BadRow where the template refuses it.

        A turn with _opaque is not shown to the template: its content is put in place afterwards, as it is.
        """
        hidden = {f"Zq{number}xopaquexqZ": turn["content"] for number, turn in enumerate(turns) if turn.get("_opaque")}
        given = [self._given(turn, f"Zq{number}xopaquexqZ") for number, turn in enumerate(turns)]
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    given,
                    tools=copy.deepcopy(tools) or None,
                    tokenize=False,
                    add_generation_prompt=asking,
                    strftime_now=self.day.strftime,
                    **(options or {}),
                )
            )
        except Exception as error:  # templates may raise anything
            raise BadRow(f"is refused by the model's chat template ({first_line(error)})") from None
        for name, content in hidden.items():
            before, found, after = text.partition(name)
            if not found or name in after:
                raise BadRow(
                    "has reasoning that the model's chat template cannot be told to keep; KEEP_REASONING=template trains such "
                    "rows without it"
                )
            text = OWN_THOUGHT.sub("", before) + content + after
        return text

    def _given(self, turn: Turn, name: str) -> Turn:
        made = copy.deepcopy({key: value for key, value in turn.items() if key[0] != "_"})
        if turn["role"] in (TOOL, "developer"):
            made["role"] = self._role(turn["role"], str(turn.get("_written", turn["role"])))
        if turn.get("_opaque"):
            made["content"] = name
        if "reasoning_content" in made and self.thought not in (None, "reasoning_content"):
            made[self.thought] = made.pop("reasoning_content")
        for call in made.get("tool_calls", ()):
            if not self.mapping:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        if "tool_calls" in made and "content" not in made and self.bare != "absent":
            made["content"] = self.bare
        if self.parts and isinstance(made.get("content"), str):
            made["content"] = [{"type": "text", "text": made["content"]}]
        return made

    def _role(self, role: str, written: str) -> str:
        """`written`, where the template knows the role by that name; developer is system where it does not."""
        if self.names(written):
            return written
        return "system" if role == "developer" else role

    def names(self, word: str) -> bool:
        """Whether the template has the word in quotes, as the name of a role or a field."""
        return f'"{word}"' in self.source or f"'{word}'" in self.source

    @functools.cached_property
    def source(self) -> str:
        """The chat template."""
        return str(self.tokenizer.chat_template)

    def switches(self) -> dict[str, bool]:
        """Options that tell this template to keep the reasoning of earlier turns."""
        return {name: value for name, value in SWITCHES.items() if re.search(rf"\b{name}\b", self.source)}
