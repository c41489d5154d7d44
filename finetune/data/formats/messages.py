"""Rows with `messages`, which go through the model's own chat template.

A template is a program that may leave out, rewrite or move what a message says. So each conversation is written twice: as it is, and
with a mark in place of each thing that a message says. A mark that is missing is something that the template leaves out; and where
the marks stand tells which characters are answers, whatever the template writes around them.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import itertools
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from finetune.data.checks import bad_characters, bad_text
from finetune.data.formats.base import BadRow, Row, Span, Text, any_of, special_texts
from finetune.errors import SettingsError, first_line
from finetune.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, Any]
THOUGHT = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<answer>.*)", re.DOTALL)
OPENED = re.compile(r"<think>\s*$")  # how the prompt of a reasoning model ends; an answer need not begin with it
NOT_YET = ("tools", "functions", "system")  # columns beside messages that mean something, and that are not read


@dataclasses.dataclass(frozen=True)
class Piece:
    """A text that a message says. turn: the message's index; what: how to name it; path: keys to it; start, end: where in that value."""

    turn: int
    what: str
    path: tuple[str | int, ...]
    start: int
    end: int
    text: str

    def told(self, turns: list[Turn]) -> str:
        """The piece, in words."""
        return f"{self.what} of message {self.turn + 1} (role {turns[self.turn]['role']}): {_short(self.text)}"


@dataclasses.dataclass(frozen=True)
class Messages:
    """The format of rows with messages. day: what a template writes as today's; train_all: TRAIN_ON=all."""

    NAME: ClassVar[str] = "messages"
    tokenizer: PreTrainedTokenizerBase
    day: datetime.date
    train_all: bool
    special: re.Pattern[str]
    asks: str  # what the template adds to ask for an answer
    ends: str  # the special tokens with which the template ends an answer; "" where it ends it with none

    @classmethod
    def recognises(cls, row: Row, settings: Settings) -> bool:
        """Rows with messages, unless they have all the columns that are asked for too."""
        return "messages" in row and not set(row).issuperset(settings.completion_columns)

    @classmethod
    def needs(cls, settings: Settings) -> tuple[str, ...]:
        """The list of messages."""
        return ("messages",)

    @classmethod
    def reads(cls, settings: Settings) -> tuple[str, ...]:
        """What may stand beside it, too."""
        return ("messages", *NOT_YET)

    @classmethod
    def problem(cls, row: Row, settings: Settings) -> str | None:
        """Each message has to have a role and text, and the last one is the assistant's."""
        return _problem(row)

    @classmethod
    def check(cls, settings: Settings) -> None:
        """Only the model's files tell whether there is a chat template."""

    @classmethod
    def of(cls, settings: Settings, tokenizer: PreTrainedTokenizerBase, day: datetime.date) -> Messages:
        """The format that the tokenizer's chat template makes. Raises SettingsError where it has none."""
        if not tokenizer.chat_template:
            raise SettingsError(
                f"DATASET_NAME={settings.dataset_name}: has messages, but {settings.model_name} has no chat template; use its "
                "instruct version, or columns with PROMPT_TEMPLATE"
            )
        bare = cls(tokenizer, day, settings.train_on == "all", any_of(special_texts(tokenizer)), "", "")
        question, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
        try:
            plain, asking = bare.written([question]), bare.written([question], asking=True)
            tail = bare.written([question, answer]).rpartition("So.")[2]
        except BadRow:  # a template may want a system prompt, or more; then each turn is looked at by itself
            return bare
        asks = OPENED.sub("", asking.removeprefix(plain)) if asking.startswith(plain) else ""
        ends = re.match(f"(?:{bare.special.pattern})+", tail.lstrip())
        return dataclasses.replace(bare, asks=asks, ends=ends[0] if ends else "")

    @property
    def writes_day(self) -> bool:
        """Whether the chat template asks what day it is, as Llama 3.1's does."""
        return "strftime_now" in str(self.tokenizer.chat_template)

    def written(self, turns: list[Turn], asking: bool = False) -> str:
        """The conversation as the chat template writes it. Raises BadRow where the template refuses it."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    copy.deepcopy(turns), tokenize=False, add_generation_prompt=asking, strftime_now=self.day.strftime
                )
            )
        except Exception as error:  # templates may raise anything
            raise BadRow(f"is refused by the model's chat template ({first_line(error)})") from None

    def prompt(self, question: str) -> str:
        """The question in the chat format, up to where the answer begins. Raises SettingsError where the template refuses it."""
        try:
            return self.written([{"role": "user", "content": question}], asking=True)
        except BadRow as refused:
            raise SettingsError(f"the question {refused}; with MAX_NEW_TOKENS=0 a run asks nothing") from None

    def text(self, row: Row) -> Text:
        """The conversation in the chat format; the answers are the assistant's turns, each with its end."""
        if unread := [name for name in NOT_YET if row.get(name)]:
            raise BadRow(
                f"has {' and '.join(unread)} beside messages. This program does not train it: put its text into the messages"
            )
        turns, marked = self._unmarked(row["messages"])
        weights = [turn.get("weight") for turn in turns]
        if odd := next((weight for weight in weights if weight not in (None, 0, 1)), None):
            raise BadRow(f"has a message of weight {odd}; it takes 0 and 1")
        if 0 in weights and self.train_all:
            raise BadRow("has a message of weight 0, which TRAIN_ON=all would train; set TRAIN_ON=response")
        text, pieces = self.written(turns), list(_pieces(turns))
        if silent := [number for number in range(len(turns)) if number not in {piece.turn for piece in pieces}]:
            raise BadRow(f"message {silent[0] + 1} says nothing")
        places = self._places(turns, pieces, text)
        self._tools_are_there(turns, text)
        answers = [
            self._answer(turns, pieces, places, number, text)
            for number, turn in enumerate(turns)
            if turn["role"] == "assistant" and turn.get("weight") != 0
        ]
        if not answers:
            raise BadRow("has no assistant's message that is trained")
        literal = [
            (start + found.start(), start + found.end())
            for piece, (start, _) in zip(pieces, places, strict=True)
            for found in self.special.finditer(piece.text)
        ]
        kept = text.rstrip()
        return Text(kept if kept.endswith(str(self.tokenizer.eos_token)) else text, answers, literal, marked)

    def _unmarked(self, turns: list[Turn]) -> tuple[list[Turn], bool]:
        """The messages without an EOS that people write at the end of an answer: the template writes one. And whether there was any."""
        eos, found = str(self.tokenizer.eos_token), []
        for turn in turns:
            content = turn["content"].rstrip() if isinstance(turn["content"], str) else ""
            ended = turn["role"] == "assistant" and content.endswith(eos) and content != eos
            found.append({**turn, "content": content.removesuffix(eos)} if ended else turn)
        return found, found != turns

    def _places(self, turns: list[Turn], pieces: list[Piece], text: str) -> list[Span]:
        """Where each piece stands in `text`. Raises BadRow that names what is not there."""
        salt = next(salt for salt in map(str, itertools.count()) if f"Qx{salt}x" not in text)
        # letters and digits alone: a template may write it as JSON
        marks = [f"Qx{salt}x{number}xQ" for number in range(len(pieces))]
        skeleton = self._marked(turns, pieces, marks)
        gone = [piece for piece, mark in zip(pieces, marks, strict=True) if mark not in skeleton]
        if gone:
            raise BadRow(f"the model's chat template leaves out {gone[0].told(turns)}")
        parts = re.split("|".join(marks), skeleton)
        if re.findall("|".join(marks), skeleton) == marks:
            rebuilt = (
                "".join(itertools.chain.from_iterable(zip(parts, [p.text for p in pieces], strict=False))) + parts[-1]
            )
            if rebuilt == text:
                ends = itertools.accumulate(
                    len(part) + len(piece.text) for part, piece in zip(parts, pieces, strict=False)
                )
                return [(end - len(piece.text), end) for end, piece in zip(ends, pieces, strict=True)]
        return [self._place(turns, piece, mark, text) for piece, mark in zip(pieces, marks, strict=True)]

    def _marked(self, turns: list[Turn], pieces: list[Piece], marks: list[str]) -> str:
        """The conversation as the template writes it, with a mark in place of each of the pieces."""
        shadow = copy.deepcopy(turns)
        for piece, mark in reversed(list(zip(pieces, marks, strict=True))):  # from the back: places before stay right
            holder: Any = shadow[piece.turn]
            for key in piece.path[:-1]:
                holder = holder[key]
            value = holder[piece.path[-1]]
            holder[piece.path[-1]] = value[: piece.start] + mark + value[piece.end :]
        return self.written(shadow)

    def _place(self, turns: list[Turn], piece: Piece, mark: str, text: str) -> Span:
        """The same for one piece, where templates move messages, or where their own text depends on what a message says.

        With a mark in this piece alone, the text is another only around it. A short answer, such as "e", stands in many places,
        so the piece has to be found there, and once.
        """
        before, _, after = self._marked(turns, [piece], [mark]).partition(mark)
        if mark in after:
            raise BadRow(f"the model's chat template writes {piece.told(turns)} more than once")
        if before + piece.text + after == text:
            return len(before), len(before) + len(piece.text)
        first = _alike(before, text)
        last = len(text) - _alike(after[::-1], text[::-1])
        again = re.compile(f"(?={re.escape(piece.text)})")
        starts = [
            found.start() for found in again.finditer(text, max(0, first - len(piece.text))) if found.start() <= last
        ]
        if not starts or before + after == text:
            raise BadRow(f"the model's chat template leaves out or rewrites {piece.told(turns)}")
        if len(starts) > 1:
            raise BadRow(f"the model's chat template changes with what a message says, which hides {piece.told(turns)}")
        return starts[0], starts[0] + len(piece.text)

    def _tools_are_there(self, turns: list[Turn], text: str) -> None:
        """Raise BadRow where the template leaves out the call of a tool."""
        for number, turn in enumerate(turns, 1):
            for call in turn.get("tool_calls") or []:
                call = call.get("function", call) if isinstance(call, dict) else {"name": call}
                arguments = call.get("arguments")
                if isinstance(arguments, str):
                    try:
                        arguments = json.loads(arguments)
                    except ValueError:
                        arguments = {"": arguments}
                for said in (call.get("name"), *_leaves(arguments)):
                    forms = {
                        str(said),
                        json.dumps(said)[1:-1],
                        json.dumps(said, ensure_ascii=False)[1:-1],
                        json.dumps(said),
                    }
                    if said is not None and not any(form in text for form in forms):
                        raise BadRow(
                            f"the model's chat template leaves out a tool call of message {number}: {_short(str(said))}"
                        )

    def _answer(self, turns: list[Turn], pieces: list[Piece], places: list[Span], number: int, text: str) -> Span:
        """The span of one of the assistant's turns: from what asks for it to its end token."""
        own = [place for piece, place in zip(pieces, places, strict=True) if piece.turn == number]
        others = [place for piece, place in zip(pieces, places, strict=True) if piece.turn != number]
        start, end = min(own)[0], max(own)[1]
        before = max((last for _, last in others if last <= start), default=0)
        after = min((first for first, _ in others if first >= end), default=len(text))
        asked = text.rfind(self.asks, before, start) if self.asks else -1
        if asked >= 0:
            start = asked + len(self.asks)
        elif number:
            # the template adds nothing to ask for an answer: then all that it writes before the turn asks for it
            asking = OPENED.sub("", self.written(turns[:number], asking=True))
            if text.startswith(asking) and before <= len(asking) <= start:
                start = len(asking)
        if turns[number].get("tool_calls"):
            through = self.written(turns[: number + 1]).rstrip()
            if text.startswith(through):
                return start, len(through)
        ending = self.special.search(text, end, after) if self.ends else None
        if ending and text.startswith(self.ends, ending.start()):
            return start, ending.start() + len(self.ends)
        return start, ending.end() if ending else end


def _problem(row: Row) -> str | None:
    """Why there is no conversation in a row as it was read; None: there is."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        return "has no list of messages"
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            return f"message {number} has no role"
        if wrong := bad_text(turn.get("content")):
            return f"content of message {number} {wrong}"
        try:
            whole = json.dumps(turn, ensure_ascii=False)  # a chat template may use what else stands in it
        except TypeError as error:  # Parquet has times and bytes
            return f"message {number} cannot be written as JSON ({first_line(error)})"
        if wrong := bad_characters(whole):
            return f"message {number} {wrong}"
    return None if turns[-1]["role"] == "assistant" else "does not end with the assistant's message"


def _pieces(turns: list[Turn]) -> Iterator[Piece]:
    """All that messages say, in the order in which templates write it, each without the white space around it."""
    for number, turn in enumerate(turns):
        for key in ("reasoning_content", "reasoning", "thinking"):
            if isinstance(turn.get(key), str):
                yield from _piece(number, f"the {key}", key, turn[key], 0, len(turn[key]))
        content = turn["content"]
        thought = THOUGHT.fullmatch(content) if turn["role"] == "assistant" else None
        if thought:
            yield from _piece(number, "what stands before </think>", "content", content, *thought.span("thought"))
            yield from _piece(number, "the answer", "content", content, *thought.span("answer"))
        else:
            yield from _piece(number, "the content", "content", content, 0, len(content))


def _piece(turn: int, what: str, key: str, value: str, start: int, end: int) -> Iterator[Piece]:
    said = value[start:end].strip()
    if said:
        start = value.index(said, start)
        yield Piece(turn, what, (key,), start, start + len(said), said)


def _alike(one: str, other: str) -> int:
    """With how many equal characters two texts begin."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _leaves(value: Any) -> Iterator[Any]:
    """The texts, numbers and truths in nested arguments, and their names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from ([key] if key else [])
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 60 else flat[:60] + " …"
