"""Calls of tools, and the tools, as people write them -> as OpenAI's chat format has them."""

from __future__ import annotations

import json
from typing import Any

from finetune.data import checks
from finetune.data.formats.base import BadRow, parsed
from finetune.errors import first_line

Turn = dict[str, Any]


def called(fields: Turn, number: int) -> list[Any]:
    """The calls in a message's fields, which are taken out: OpenAI's list, or the one call that it had before."""
    many, one = fields.pop("tool_calls", None), fields.pop("function_call", None)
    found = [] if checks.empty(many) else listed(many, f"tool_calls of message {number}")
    return found if checks.empty(one) else [*found, one]


def written(content: Any, number: int) -> list[Any]:
    """The calls that ShareGPT writes as JSON in the text of a message."""
    return listed(parsed(content, f"message {number} calls a tool, but its text is"), f"message {number}")


def listed(value: Any, where: str) -> list[Any]:
    """Calls as a list, where there is one alone."""
    found = [value] if isinstance(value, dict) else value
    if not isinstance(found, list):
        raise BadRow(f'{where} calls a tool, but is {checks.kind(value)}; it takes {{"name": …, "arguments": {{…}}}}')
    return found


def call(call: Any, number: int, said: set[str]) -> Turn:
    """One call: {"type": "function", "function": {"name", "arguments": an object}}, with its id where it has one."""
    outer: Turn = call if isinstance(call, dict) else {}
    inner: Turn = outer["function"] if isinstance(outer.get("function"), dict) else outer
    name, arguments = inner.get("name"), inner.get("arguments", inner.get("parameters"))
    if not isinstance(name, str) or not name.strip():
        raise BadRow(f"message {number} calls a tool without a name")
    given = parsed(arguments, f"message {number}: arguments of {name} are")
    if checks.empty(given):
        given = {}
    if not isinstance(given, dict):
        raise BadRow(f"message {number}: arguments of {name} are {checks.kind(given)}, not an object")
    if given is arguments:
        given = _without_nulls(given, said)
    known = ("name", "arguments", "parameters")
    more = {
        key: value
        for key, value in inner.items()
        if key not in (*known, "id", "type", "function") and value is not None
    }
    wire = {"id": outer["id"]} if outer.get("id") is not None else {}
    return {**wire, "type": "function", "function": {"name": name, "arguments": given, **more}}


def _without_nulls(value: Any, said: set[str]) -> Any:
    if isinstance(value, dict):
        kept = {key: _without_nulls(inner, said) for key, inner in value.items() if inner is not None}
        if len(kept) < len(value):
            said.add("nulls")
        return kept
    return [_without_nulls(inner, said) for inner in value] if isinstance(value, list) else value


def tools(given: Any, said: set[str]) -> list[dict[str, Any]]:
    """Tools, a list or JSON in a text, each as {"type": "function", "function": {…}}. Raises BadRow."""
    try:
        found = checks.parsed(given)
        whole = json.dumps(found, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"tools are not JSON ({first_line(error)})") from None
    if wrong := checks.bad_characters(whole):
        raise BadRow(f"tools {wrong}")
    if checks.empty(found):
        return []
    found = [found] if isinstance(found, dict) else found
    made = []
    for tool in found if isinstance(found, list) else [found]:
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow(
                'has tools without a name; each is {"type": "function", "function": {"name": …, "parameters": {…}}}'
            )
        kept = _without_nulls(tool, said) if found is given else tool
        made.append(kept if "function" in kept else {"type": "function", "function": kept})
    return made
