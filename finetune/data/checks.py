"""What is wrong with a value of a row, in words that follow its place."""

from __future__ import annotations

import json
import math
from typing import Any


def bad_text(value: Any) -> str | None:
    """Why a value is no text to train on; None: it is one."""
    if value is None:
        return "is null"
    if isinstance(value, float) and not math.isfinite(value):
        return "is no number that JSON has"
    if isinstance(value, bool | int | float):
        return None
    if not isinstance(value, str):
        return f"is {kind(value)}, not text"
    if not value.strip():
        return "is only white space" if value else "is empty"
    return bad_characters(value)


def text(value: bool | int | float | str) -> str:
    """The text that is trained for a value: a number, true and false as JSON writes them."""
    return value if isinstance(value, str) else json.dumps(value)


def is_bare(value: Any) -> bool:
    """Whether a value is a number, true or false, and so stands for the text that JSON writes of it."""
    return isinstance(value, bool | int | float)


def empty(value: Any) -> bool:
    """Whether nothing is said: null, no text, an empty list or object."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def bad_characters(text: str) -> str | None:
    """JSON can write half of a surrogate pair, which neither UTF-8 nor a tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has half a character, \\u{ord(text[error.start]):x}; its halves come in pairs, such as \\ud83d\\ude00"
    return None


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    return {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text", type(None): "null"}.get(type(value), str(type(value).__name__))  # fmt: skip


def whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as json's object_pairs_hook. Python keeps the last of two values with one name; nothing may be lost so."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {next(name for name in names if names.count(name) > 1)} more than once")
    return made


def parsed(value: Any) -> Any:
    """Lists and objects that are written as JSON in a text, as in CSV; every other value as it is. Raises ValueError."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        return json.loads(value, object_pairs_hook=whole)
    return value
