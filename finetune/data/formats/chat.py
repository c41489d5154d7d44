"""Conversations go through the model's own chat template."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from typing import TYPE_CHECKING, Any, ClassVar, Self

from finetune.data import checks
from finetune.data.formats.answers import OPENED, Answers
from finetune.data.formats.base import BadRow, Row, Span, Text, any_of, special_texts
from finetune.data.formats.dialect import ASKED, Dialect
from finetune.data.formats.marks import Layout, Missing, lay
from finetune.data.formats.pieces import thought_in
from finetune.data.formats.turns import ASSISTANT, USER, Conversation, Turn
from finetune.errors import SettingsError
from finetune.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMPTY = re.compile(r"<think>\s*</think>\s*$")


@dataclasses.dataclass(frozen=True)
class Chat:
    """What the tokenizer's chat template makes of conversations. keeps: KEEP_REASONING; train_on: TRAIN_ON."""

    dialect: Dialect
    keeps: str
    train_on: str
    special: re.Pattern[str]
    eos: str
    asks: str  # what the template adds to ask for an answer
    ends: str  # the special tokens with which the template ends an answer; "" where it ends it with none
    opens: bool = False  # whether what asks for an answer ends with <think>

    @classmethod
    def of(cls, settings: Settings, tokenizer: PreTrainedTokenizerBase, day: datetime.date) -> Chat:
        """The chat format of a tokenizer. Raises SettingsError where it has no chat template."""
        if not tokenizer.chat_template:
            raise SettingsError(
                f"DATASET_NAME={settings.dataset_name}: has messages, but {settings.model_name} has no chat template; use its "
                "instruct version, or columns with PROMPT_TEMPLATE"
            )
        dialect, special = Dialect.of(tokenizer, day), any_of(special_texts(tokenizer))
        bare = cls(dialect, settings.keep_reasoning, settings.train_on, special, str(tokenizer.eos_token), "", "")
        answer = {"role": ASSISTANT, "content": "QxsaidxQ"}
        try:
            plain, asking = dialect.write([ASKED]), dialect.write([ASKED], asking=True)
            tail = dialect.write([ASKED, answer]).rpartition("QxsaidxQ")[2]
        except BadRow:  # a template may want a system prompt, or more; then each turn is looked at by itself
            return bare
        asks = OPENED.sub("", asking.removeprefix(plain)) if asking.startswith(plain) else ""
        ends = re.match(f"(?:{special.pattern})+", tail.lstrip())
        return dataclasses.replace(bare, asks=asks, ends=ends[0] if ends else "", opens=bool(OPENED.search(asking)))

    @property
    def writes_day(self) -> bool:
        """Whether the chat template asks what day it is, as Llama 3.1's does."""
        return "strftime_now" in self.dialect.source

    def prompt(self, question: str) -> str:
        """The question in the chat format, up to where the answer begins. Raises SettingsError where the template refuses it."""
        try:
            return self.dialect.write([{"role": USER, "content": question}], asking=True)
        except BadRow as refused:
            raise SettingsError(f"the question {refused}; with MAX_NEW_TOKENS=0 a run asks nothing") from None

    def text(self, said: Conversation) -> Text:
        """The conversation in the chat format; the answers are the assistant's turns, each with its end. Raises BadRow."""
        self._has_place_for_tools(said)
        flags = set(said.said)
        turns = [self._prepared(turn, flags) for turn in said.turns]
        if self.keeps == "last":
            turns = _without_thoughts(turns, flags)
        layout, turns, options = self._laid(turns, said, flags)
        quiet = set(range(len(turns))) - {piece.turn for piece in layout.pieces}
        if silent := [
            n for n in sorted(quiet) if turns[n]["role"] in (USER, ASSISTANT) and not turns[n].get("tool_calls")
        ]:
            raise BadRow(f"message {silent[0] + 1} says nothing")
        if layout.unwritten or any(self._unread(turn) for turn in turns):
            flags.add("unwritten")
        spoken = [n for n, turn in enumerate(turns) if turn["role"] == ASSISTANT and n >= said.context]
        taken = [n for n in (spoken[-1:] if self.train_on == "last" else spoken) if n not in said.muted]
        if not taken:
            raise BadRow("has no assistant's message that is trained")
        find = Answers(self.dialect, self.special, self.asks, self.ends, turns, said.tools, options, layout)
        spans = {
            number: find.span(number) for number in {*taken, *(n for n in said.muted if turns[n]["role"] == ASSISTANT)}
        }
        others = [span for piece, span in layout.found() if piece.turn in said.muted and piece.turn not in spans]
        if wrong := checks.bad_characters(layout.text):
            raise BadRow(f"its text {wrong}")
        kept = layout.text.rstrip()
        return Text(
            text=kept if kept.endswith(self.eos) else layout.text,
            answers=[spans[n] for n in taken],
            literal=self._literal(layout, said),
            untrained=[spans[n] for n in spans if n in said.muted] + others,
            ends=len(turns) - 1 not in said.muted,
            said=frozenset(flags),
        )

    def _literal(self, layout: Layout, said: Conversation) -> list[Span]:
        """Where the row holds the text of special tokens. Raises BadRow where that is not known."""
        found, text = set[Span](), layout.text
        for _, (start, end) in layout.found():
            found |= {(start + one.start(), start + one.end()) for one in self.special.finditer(text[start:end])}
        hidden = [piece.text for piece, span in zip(layout.pieces, layout.places, strict=True) if not span]
        known = sum(len(self.special.findall(piece.text)) for piece in layout.pieces if piece.turn < 0)
        if len(self.special.findall(json.dumps(said.tools, ensure_ascii=False))) > known or any(
            map(self.special.search, hidden)
        ):
            raise BadRow(
                "holds the text of a special token in a tool or a call, where the chat template would make it one"
            )
        return sorted(found)

    def _has_place_for_tools(self, said: Conversation) -> None:
        """Raise BadRow where the template never reads tools, or calls of them."""
        called = next((number for number, turn in enumerate(said.turns, 1) if "tool_calls" in turn), None)
        if called and "tool_calls" not in self.dialect.source:
            raise BadRow(f"message {called} calls a tool, and the model's chat template has no place for calls")
        if said.tools and "tools" not in self.dialect.source:
            raise BadRow("has tools, and the model's chat template has no place for them")

    def _prepared(self, turn: Turn, flags: set[str]) -> Turn:
        """A turn without an EOS that people write at the end of an answer, and with its reasoning where the template looks for it."""
        if turn["role"] != ASSISTANT or "content" not in turn:
            return turn
        content = turn["content"].rstrip()
        if content.endswith(self.eos) and content != self.eos:  # the template writes one
            flags.add("marked")
            turn = {**turn, "content": content.removesuffix(self.eos)}
        found = thought_in(turn["content"])
        if not found or "reasoning_content" in turn:
            return turn
        if not self.dialect.tags and self.dialect.thought:
            return {**turn, "content": found["answer"].strip(), "reasoning_content": found["thought"].strip()}
        if self.opens and not turn["content"].lstrip().startswith("<think>"):
            return {**turn, "content": "<think>\n" + turn["content"].lstrip()}
        return turn

    def _laid(
        self, turns: list[Turn], said: Conversation, flags: set[str]
    ) -> tuple[Layout, list[Turn], dict[str, Any]]:
        """The conversation with its reasoning, as KEEP_REASONING says. Raises BadRow."""
        options, missing = said.options, frozenset[int]()
        while True:
            try:
                layout = lay(self._writer(options), turns, said.tools, missing)
                if self.keeps == "template" or not (bare := self._without_empty_thought(turns, layout)):
                    return layout, turns, options
                lost = bare
            except Missing as found:
                lost = frozenset(piece.turn for piece in found.pieces if piece.kind == "thought")
                first = next((piece for piece in found.pieces if piece.kind != "thought"), found.pieces[0])
                why = f"the model's chat template leaves out {first.told(turns)}"
                if len(lost) == 0 or first.kind != "thought" or lost <= missing:
                    raise BadRow(why) from None
                if self.keeps == "template":
                    flags.add("thoughtless")
                    missing |= lost
                    continue
                why += "; KEEP_REASONING=template trains such rows without it"
                switches = {name: value for name, value in self.dialect.switches().items() if name not in options}
                if switches:
                    flags.add("switched")
                    options = {**switches, **options}
                    continue
                if not self.dialect.tags or any(turns[n].get("_opaque") for n in lost):
                    raise BadRow(why) from None
            flags.add("wrapped")
            flags.discard("switched")
            turns = [_opaque(turn) if number in lost else turn for number, turn in enumerate(turns)]

    def _writer(self, options: dict[str, Any]) -> Any:
        return lambda turns, tools: self.dialect.write(turns, tools, options)

    def _without_empty_thought(self, turns: list[Turn], layout: Layout) -> frozenset[int]:
        """Turns that say <think></think>, which tells a model not to think, where the template leaves that out."""
        found = set()
        for number, turn in enumerate(turns):
            split = thought_in(turn.get("content", "")) if turn["role"] == ASSISTANT else None
            if split and not split["thought"].strip() and not turn.get("_opaque") and self.dialect.tags:
                own = next(
                    (span for piece, span in layout.found() if piece.turn == number and piece.kind == "text"), None
                )
                if own and not EMPTY.search(layout.text[: own[0]]):
                    found.add(number)
        return frozenset(found)

    def _unread(self, turn: Turn) -> bool:
        """Whether a turn has a field that is no text, and that the template does not mention."""
        known = ("role", "content", "reasoning_content", "tool_calls")
        fields = (
            key for key, value in turn.items() if key not in known and key[0] != "_" and not isinstance(value, str)
        )
        return any(not re.search(rf"\b{re.escape(key)}\b", self.dialect.source) for key in fields)


class Chatting:
    """A format whose rows are conversations. Those below say which columns they have, and what a row's conversation is."""

    NAME: ClassVar[str]
    TOLD: ClassVar[str]
    chat: Chat

    def __init__(self, chat: Chat):
        self.chat = chat

    @classmethod
    def conversation(cls, row: Row) -> Conversation:
        """The row's conversation. Raises BadRow."""
        raise NotImplementedError

    @classmethod
    def problem(cls, row: Row, settings: Settings) -> str | None:
        """Why there is no conversation in a row."""
        try:
            cls.conversation(row)
        except BadRow as bad:
            return str(bad)
        return None

    @classmethod
    def check(cls, settings: Settings) -> None:
        """Only the model's files tell whether there is a chat template."""

    @classmethod
    def of(cls, settings: Settings, tokenizer: PreTrainedTokenizerBase, day: datetime.date) -> Self:
        """The format that the tokenizer's chat template makes. Raises SettingsError where it has none."""
        return cls(Chat.of(settings, tokenizer, day))

    @property
    def writes_day(self) -> bool:
        """Whether the chat template writes today's date."""
        return self.chat.writes_day

    def text(self, row: Row) -> Text:
        """The conversation in the chat format."""
        return self.chat.text(self.conversation(row))

    def prompt(self, question: str) -> str:
        """The question in the chat format."""
        return self.chat.prompt(question)


def _without_thoughts(turns: list[Turn], flags: set[str]) -> list[Turn]:
    """The turns, with reasoning only after the last question, as reasoning models see them when they answer."""
    last = max((number for number, turn in enumerate(turns) if turn["role"] == USER), default=0)
    found = []
    for number, turn in enumerate(turns):
        split = thought_in(turn.get("content", "")) if turn["role"] == ASSISTANT and number < last else None
        bare = {key: value for key, value in turn.items() if key != "reasoning_content"} if number < last else turn
        found.append({**bare, "content": split["answer"].lstrip()} if split else bare)
    if found != turns:
        flags.add("thoughtless")
    return found


def _opaque(turn: Turn) -> Turn:
    """The turn with its reasoning in its content, which the template is to write as it is."""
    content, thought = turn.get("content", ""), turn.get("reasoning_content")
    bare = {key: value for key, value in turn.items() if key != "reasoning_content"}
    return {
        **bare,
        "_opaque": True,
        "content": f"<think>\n{thought.strip()}\n</think>\n\n{content}" if thought else content,
    }
