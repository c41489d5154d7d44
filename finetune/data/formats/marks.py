"""Where a chat template writes what messages say: the conversation is written twice, once with marks in its place.

A template is a program that may leave out, rewrite or move what a message says. A mark that is missing is something that the template
leaves out; and where the marks stand tells which characters are answers, whatever the template writes around them.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

from finetune.data.formats.base import BadRow, Span
from finetune.data.formats.pieces import Piece, pieces
from finetune.data.formats.turns import Turn

PLAIN = ("text", "thought", "field")  # kinds of pieces that stand in the text of messages

Write = Callable[[list[Turn], list[Any]], str]  # turns and tools -> what the template makes of them


class Missing(Exception):
    """The template leaves pieces out."""

    def __init__(self, pieces: list[Piece]):
        super().__init__()
        self.pieces = pieces


@dataclasses.dataclass(frozen=True)
class Layout:
    """A conversation as it is written. places: of each piece's first mark, in the order of `pieces`; None: it is there, and where is not known.

    unwritten: fields that are not in it.
    """

    text: str
    pieces: list[Piece]
    places: list[Span | None]
    unwritten: bool

    def found(self) -> list[tuple[Piece, Span]]:
        """The pieces whose place is known."""
        return [(piece, span) for piece, span in zip(self.pieces, self.places, strict=True) if span]


def lay(write: Write, turns: list[Turn], tools: list[Any], ignored: frozenset[int]) -> Layout:
    """The conversation as `write` writes it, and where each piece stands. ignored: turns whose reasoning may be left out.

    Raises Missing, and BadRow where the template refuses the conversation, or where a piece cannot be found.
    """
    text, found = write(turns, tools), pieces(turns, tools)
    found = [piece for piece in found if piece.kind != "thought" or piece.turn not in ignored]
    plain = [piece for piece in found if piece.kind in PLAIN]
    work = _Laying(write, turns, tools, text)
    if plain != found:
        # templates may sort the names of arguments, or know a tool by its name: then those are not marked, or equally
        few = [piece for piece in found if piece.kind != "key"]
        first: Missing | None = None
        for chosen, shared in ((found, False), (few, False), (found, True), (few, True)):
            try:
                if made := work.laid(chosen, shared):
                    return made
            except Missing as missing:
                first = first or missing
                if shared or any(piece.kind in PLAIN for piece in missing.pieces):
                    raise first from None
            except BadRow:  # the template takes no mark there
                continue
    made = work.laid(plain, False, last=True)
    assert made is not None
    rest = [piece for piece in found if piece not in plain]
    for piece in rest:
        if not any(form in text for form in piece.forms()):
            raise BadRow(f"the model's chat template leaves out {piece.told(turns)}")
    return dataclasses.replace(made, pieces=made.pieces + rest, places=[*made.places, *[None] * len(rest)])


@dataclasses.dataclass(frozen=True)
class _Laying:
    """One conversation, and its text."""

    write: Write
    turns: list[Turn]
    tools: list[Any]
    text: str

    def laid(self, found: list[Piece], shared: bool, last: bool = False) -> Layout | None:
        """None: the marks do not stand where the pieces do, and it is not the last try. shared: equal names get equal marks."""
        salt = next(salt for salt in map(str, itertools.count()) if f"Qx{salt}x" not in self.text)
        first: dict[str, int] = {}
        numbers = [
            first.setdefault(piece.text, at) if shared and piece.kind == "name" else at
            for at, piece in enumerate(found)
        ]
        # letters and digits alone: a template may write it as JSON
        marks = [f"Qx{salt}x{number}xQ" for number in numbers]
        skeleton = self.marked(found, marks)
        order = [int(number) for number in re.findall(rf"Qx{salt}x(\d+)xQ", skeleton)]
        gone = [piece for piece, number in zip(found, numbers, strict=True) if number not in order]
        if needed := [piece for piece in gone if piece.kind != "field"]:
            without = [piece for piece in found if piece.kind != "field"]
            if without != found:  # a mark in a field may change what is written
                return self.laid(without, shared, last)
            raise Missing(needed)
        places = _aligned(self.text, re.split(rf"Qx{salt}x\d+xQ", skeleton), order, found)
        if places is None and not last:
            return None
        kept = [(piece, mark, n) for piece, mark, n in zip(found, marks, numbers, strict=True) if n in order]
        spans: list[Span | None] = []
        for piece, mark, number in kept:
            if places is None:
                spans.append(self.place(piece, mark) if piece.kind != "field" else None)
            else:
                spans.append(places[number] if numbers.count(number) == 1 else None)
        return Layout(self.text, [piece for piece, _, _ in kept], spans, bool(gone))

    def marked(self, found: list[Piece], marks: list[str]) -> str:
        """The conversation as the template writes it, with a mark in place of each of the pieces."""
        shadow, schemas = copy.deepcopy(self.turns), copy.deepcopy(self.tools)
        for piece, mark in reversed(list(zip(found, marks, strict=True))):  # from the back: places before stay right
            holder: Any = schemas if piece.turn < 0 else shadow[piece.turn]
            for key in piece.path[:-1]:
                holder = holder[key]
            last = piece.path[-1]
            if piece.kind == "key":
                renamed = {mark if key == last else key: value for key, value in holder.items()}
                holder.clear()
                holder.update(renamed)
            else:
                value = holder[last]
                holder[last] = value[: piece.start] + mark + value[piece.end :]
        return self.write(shadow, schemas)

    def place(self, piece: Piece, mark: str) -> Span:
        """The same for one piece, where templates move messages, or where their own text depends on what a message says.

        With a mark in this piece alone, the text is another only around it. A short answer, such as "e", stands in many places,
        so the piece has to be found there, and once.
        """
        text = self.text
        before, _, after = self.marked([piece], [mark]).partition(mark)
        if mark in after:
            raise BadRow(f"the model's chat template writes {piece.told(self.turns)} more than once")
        for form in piece.forms():
            if before + form + after == text:
                return len(before), len(before) + len(form)
        first = _alike(before, text)
        last = len(text) - _alike(after[::-1], text[::-1])
        starts: list[Span] = []
        for form in piece.forms():
            again = re.compile(f"(?={re.escape(form)})").finditer(text, max(0, first - len(form)))
            starts = starts or [(one.start(), one.start() + len(form)) for one in again if one.start() <= last]
        if not starts or before + after == text:
            raise BadRow(f"the model's chat template leaves out or rewrites {piece.told(self.turns)}")
        if len(starts) > 1:
            raise BadRow(
                f"the model's chat template changes with what a message says, which hides {piece.told(self.turns)}"
            )
        return starts[0]


def _aligned(text: str, parts: list[str], order: list[int], found: list[Piece]) -> dict[int, Span] | None:
    """The first place of each piece, where `text` is the parts with the pieces between them. None: it is not."""
    if any(order.count(n) > 1 for n in order if found[n].kind in ("text", "thought")):
        return None
    places: dict[int, Span] = {}
    at = 0
    for part, number in itertools.zip_longest(parts, order):
        if not text.startswith(part, at):
            return None
        at += len(part)
        if number is None:
            continue
        forms = found[number].forms()
        form = next((form for form in sorted(forms, key=len, reverse=True) if text.startswith(form, at)), None)
        if form is None:
            return None
        places.setdefault(number, (at, at + len(form)))
        at += len(form)
    return places if at == len(text) else None


def _alike(one: str, other: str) -> int:
    """With how many equal characters two texts begin."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
