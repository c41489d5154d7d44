"""The texts that a conversation is made of, and where in its turns each of them stands."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from finetune.data.formats.base import short
from finetune.data.formats.turns import ASSISTANT, TOOL, WIRES, Turn

# an answer may begin with its reasoning; R1's are often given without the opening tag, which stands in what asks for them
THOUGHT = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<answer>.*)", re.DOTALL)
UNOPENED = re.compile(r"(?P<thought>(?:(?!<think>).)*?\n)[ \t]*</think>[ \t]*(?=\n|$)(?P<answer>.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A text that a message says. turn: the message's index, -1: the tools; kind: text, thought, field, name, call, key or tool.

    what: how to name it; path: keys to it; start, end: where in that value.
    """

    turn: int
    kind: str
    what: str
    path: tuple[str | int, ...]
    start: int
    end: int
    text: str
    exact: bool  # written letter for letter; what is no answer may be written as JSON

    def told(self, turns: list[Turn]) -> str:
        """The piece, in words."""
        if self.turn < 0:
            return f"{self.what}: {short(self.text)}"
        turn = turns[self.turn]
        return f"{self.what} of message {self.turn + 1} (role {turn.get('_written', turn['role'])}): {short(self.text)}"

    def forms(self) -> list[str]:
        """How a template may write it."""
        if self.exact:
            return [self.text]
        escaped = json.dumps(self.text, ensure_ascii=False)[1:-1]
        html = escaped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("'", "\\u0027")
        python = json.dumps(self.text, ensure_ascii=False)[1:-1].replace('\\"', '"').replace("'", "\\'")
        # the last two: Jinja's own tojson, and calls as Python writes them
        return list(dict.fromkeys([self.text, escaped, json.dumps(self.text)[1:-1], html, python]))


def thought_in(content: str) -> re.Match[str] | None:
    """The `thought` and the `answer` of an answer that begins with its reasoning; None: it does not."""
    return THOUGHT.fullmatch(content) or UNOPENED.fullmatch(content)


def pieces(turns: list[Turn], tools: list[Any]) -> list[Piece]:
    """All that a conversation says, each without the white space around it."""
    found = [piece for number, tool in enumerate(tools) for piece in _tool(tool["function"], (number, "function"))]
    for number, turn in enumerate(turns):
        found += _turn(number, turn)
    return found


def _turn(number: int, turn: Turn) -> Iterator[Piece]:
    exact = turn["role"] == ASSISTANT
    if thought := turn.get("reasoning_content"):
        yield from _piece(number, "thought", "the reasoning", ("reasoning_content",), thought, 0, len(thought), exact)
    content = turn.get("content") or ""
    split = thought_in(content) if exact else None
    if split:
        yield from _piece(
            number, "thought", "what stands before </think>", ("content",), content, *split.span("thought"), True
        )
        yield from _piece(number, "text", "the answer", ("content",), content, *split.span("answer"), True)
    else:
        yield from _piece(number, "text", "the content", ("content",), content, 0, len(content), exact)
    for at, call in enumerate(turn.get("tool_calls", ())):
        path = ("tool_calls", at, "function")
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        yield from _piece(number, "name", "a tool call", (*path, "name"), name, 0, len(name), False)
        yield from _leaves(number, arguments, (*path, "arguments"))
    known = ("role", "content", "reasoning_content", "tool_calls", *WIRES)
    for key, value in turn.items():
        if key not in known and key[0] != "_" and isinstance(value, str):
            kind = "name" if key == "name" and turn["role"] == TOOL else "field"
            yield from _piece(number, kind, f"the {key}", (key,), value, 0, len(value), False)


def _leaves(turn: int, value: Any, path: tuple[str | int, ...]) -> Iterator[Piece]:
    """The texts in the arguments of a call, and their names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key.strip():
                yield Piece(turn, "key", "a tool call", (*path, key), 0, len(key), key, False)
            yield from _leaves(turn, inner, (*path, key))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from _leaves(turn, inner, (*path, at))
    elif isinstance(value, str):
        yield from _piece(turn, "call", "a tool call", path, value, 0, len(value), False)


def _tool(function: dict[str, Any], path: tuple[str | int, ...]) -> Iterator[Piece]:
    """A tool's name, description, and the names and descriptions of its parameters."""
    name = function["name"]
    yield from _piece(-1, "name", "the tool", (*path, "name"), name, 0, len(name), False)
    yield from _described(function, path)


def _described(schema: Any, path: tuple[str | int, ...]) -> Iterator[Piece]:
    if not isinstance(schema, dict):
        return
    if isinstance(said := schema.get("description"), str):
        yield from _piece(-1, "tool", "the description of a tool", (*path, "description"), said, 0, len(said), False)
    for key in ("parameters", "items"):
        yield from _described(schema.get(key), (*path, key))
    properties = schema.get("properties")
    for key, inner in properties.items() if isinstance(properties, dict) else ():
        yield Piece(-1, "key", "a parameter of a tool", (*path, "properties", key), 0, len(key), key, False)
        yield from _described(inner, (*path, "properties", key))


def _piece(
    turn: int, kind: str, what: str, path: tuple[str | int, ...], value: str, start: int, end: int, exact: bool
) -> Iterator[Piece]:
    said = value[start:end].strip()
    if said:
        start = value.index(said, start)
        yield Piece(turn, kind, what, path, start, start + len(said), said, exact)
