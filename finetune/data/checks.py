"""What is wrong with a row, in words that follow its place."""

from __future__ import annotations

import json
from typing import Any

from finetune.errors import first_line


def problem(row: Any, columns: tuple[str, ...], *, messages: bool) -> str | None:
    """Why there is no training text in a row as it was read; None: there is. columns: those that have to hold text."""
    if not isinstance(row, dict):
        return f"is {_kind(row)}, not an object"
    return _bad_messages(row) if messages else _bad_columns(row, columns)


def _bad_columns(row: dict[str, Any], columns: tuple[str, ...]) -> str | None:
    for column in columns:
        if column not in row:
            return f"has no column {column}; its columns are {', '.join(map(str, row)) or 'none'}"
        if problem := _bad_text(row[column]):
            return f"column {column} {problem}"
    return None


def _bad_text(value: Any) -> str | None:
    if value is None:
        return "is null"
    if not isinstance(value, str):
        return f"is {_kind(value)}, not text"
    if not value.strip():
        return "is only white space" if value else "is empty"
    return _bad_characters(value)


def _bad_characters(text: str) -> str | None:
    """JSON can write half of a surrogate pair, which neither UTF-8 nor a tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has half a character, \\u{ord(text[error.start]):x}; its halves come in pairs, such as \\ud83d\\ude00"
    return None


def _bad_messages(row: dict[str, Any]) -> str | None:
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        return "has no list of messages"
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            return f"message {number} has no role"
        if problem := _bad_text(turn.get("content")):
            return f"content of message {number} {problem}"
        try:
            whole = json.dumps(turn, ensure_ascii=False)  # a chat template may use what else stands in it
        except TypeError as error:  # Parquet has times and bytes
            return f"message {number} cannot be written as JSON ({first_line(error)})"
        if problem := _bad_characters(whole):
            return f"message {number} {problem}"
    return None if turns[-1]["role"] == "assistant" else "does not end with the assistant's message"


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text", type(None): "null"}.get(type(value), str(type(value).__name__))  # fmt: skip
