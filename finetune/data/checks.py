"""What is wrong with a value of a row, in words that follow its place."""

from __future__ import annotations

from typing import Any


def bad_text(value: Any) -> str | None:
    """Why a value is no text to train on; None: it is one."""
    if value is None:
        return "is null"
    if not isinstance(value, str):
        return f"is {kind(value)}, not text"
    if not value.strip():
        return "is only white space" if value else "is empty"
    return bad_characters(value)


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
