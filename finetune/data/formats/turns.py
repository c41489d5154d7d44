"""A list of messages as people write it -> turns as OpenAI's chat format has them, with nothing left out in silence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from finetune.data import checks
from finetune.data.formats import calls
from finetune.data.formats.base import BadRow, parsed, said_text, short
from finetune.errors import first_line

Turn = dict[str, Any]

USER, ASSISTANT, CALL, TOOL = "user", "assistant", "function_call", "tool"
# what people call a role -> its name in chat templates; any other role is handed on, and refused where the template leaves it out
ROLES = {
    **dict.fromkeys(("human", "user"), USER),
    **dict.fromkeys(("gpt", "model", "bot", "assistant", "ai", "chatgpt"), ASSISTANT),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), CALL),
    **dict.fromkeys(("tool", "function", "observation", "environment", "ipython", "function_response"), TOOL),
    **dict.fromkeys(("tool_response", "tool_result"), TOOL),
    "system": "system",
    "developer": "developer",
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "train", "training")  # OpenAI's, and axolotl's
TEXTS = ("text", "input_text", "output_text")  # parts of a message that are text
WIRES = ("id", "tool_call_id")  # which result belongs to which call; the order says it too


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A row's turns: role, content (text; absent where only tools are called), reasoning_content, tool_calls, and other fields.

    tools: what may be called. context: how many turns at the beginning are only what is asked. muted: indices of turns of weight 0.
    options: for the chat template. said: those of FLAGS that hold.
    """

    turns: list[Turn]
    tools: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    context: int = 0
    muted: frozenset[int] = frozenset()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    said: frozenset[str] = frozenset()


def conversation(
    messages: Any,
    column: str,
    *,
    system: Any = None,
    tools: Any = None,
    options: Any = None,
    asked: Any = None,
) -> Conversation:
    """The conversation of a row. column: what holds the messages; asked: messages before them that are not answers.

    Raises BadRow.
    """
    said: set[str] = set()
    turns = [] if asked is None else list(_turns(asked, "prompt", said))
    context = len(turns)
    turns += _turns(messages, column, said)
    if turns[-1]["role"] != ASSISTANT:
        raise BadRow("does not end with the assistant's message")
    if not checks.empty(system):
        before, turns = len(turns), _with_system(turns, system, said)
        context += (len(turns) - before) if context else 0
    weights = [_weight(turn, number) for number, turn in enumerate(turns, 1)]
    muted = frozenset(number for number, weight in enumerate(weights) if weight == 0)
    if muted:
        said.add("muted")
    _in_order(turns)
    return Conversation(turns, calls.tools(tools, said), context, muted, _options(options), frozenset(said))


def listed(value: Any, column: str) -> list[Any]:
    """A column's list of messages, which CSV holds as JSON in a text. Raises BadRow."""
    value = parsed(value, f"{column} is")
    if not isinstance(value, list) or not value:
        raise BadRow(f"has no list of {column}")
    return value


def _turns(messages: Any, column: str, said: set[str]) -> Iterator[Turn]:
    for number, message in enumerate(listed(messages, column), 1):
        if not isinstance(message, dict):
            raise BadRow(f"message {number} has no role")
        try:
            whole = json.dumps(message, ensure_ascii=False)  # a chat template may use what else stands in it
        except (TypeError, ValueError) as error:  # Parquet has times and bytes
            raise BadRow(f"message {number} cannot be written as JSON ({first_line(error)})") from None
        yield _turn(message, number, whole, said)


def _turn(message: Turn, number: int, whole: str, said: set[str]) -> Turn:
    """One message in OpenAI's form. Fields without a value, as Parquet has them, are not there."""
    fields = {key: value for key, value in message.items() if value is not None}
    role = next((fields.pop(key) for key in ("role", "from") if key in fields), None)
    if not isinstance(role, str) or not role.strip():
        raise BadRow(f"message {number} has no role")
    content = next((fields.pop(key) for key in ("content", "value", "text") if key in fields), None)
    turn: Turn = {"role": ROLES.get(role.strip().lower(), role), "_written": role}
    called = calls.called(fields, number)
    if turn["role"] == CALL:
        turn["role"], called, content = ASSISTANT, [*called, *calls.written(content, number)], None
    if isinstance(content, list):
        content, thought = _joined(content, number)
        if thought:
            fields.setdefault(THOUGHTS[0], thought)
    turn |= _thought(fields, number, said)
    if called:
        if turn["role"] != ASSISTANT:
            raise BadRow(f"message {number} (role {role}) calls tools; only the assistant does")
        turn["tool_calls"] = [calls.call(call, number, said) for call in called]
    turn |= _content(turn, content, number, said)
    turn |= {key: value for key, value in fields.items() if value not in ([], {}, "")}
    if wrong := checks.bad_characters(whole):
        raise BadRow(f"message {number} {wrong}")
    return turn


def _thought(fields: Turn, number: int, said: set[str]) -> Turn:
    """The reasoning in a message's fields, which are taken out."""
    found = {key: fields.pop(key) for key in THOUGHTS if key in fields}
    thoughts = {said_text(value, f"{key} of message {number}", said) for key, value in found.items() if value != ""}
    if len(thoughts) > 1:
        raise BadRow(f"message {number} has {' and '.join(found)}, which differ; it takes one of them")
    return {"reasoning_content": thoughts.pop()} if thoughts else {}


def _content(turn: Turn, content: Any, number: int, said: set[str]) -> Turn:
    """The content of a turn, where it has one: a call of tools may have none, and a result or a system prompt may be empty."""
    role, where = turn["role"], f"content of message {number}"
    if role == TOOL and isinstance(content, dict):
        said.add("as_json")
        return {"content": json.dumps(content, ensure_ascii=False)}
    if content in (None, "") or (isinstance(content, str) and not content.strip()):
        if role == ASSISTANT and ("tool_calls" in turn or "reasoning_content" in turn):
            return {} if "tool_calls" in turn else {"content": ""}
        if role in (TOOL, "system", "developer") and content is not None:
            return {"content": content}
    return {"content": said_text(content, where, said)}


def _joined(parts: list[Any], number: int) -> tuple[str, str]:
    """Text and reasoning of a content that is a list of parts. Raises BadRow for parts that are no text."""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else checks.kind(part)
        said = part.get(kind if kind in ("thinking", "reasoning") else "text") if isinstance(part, dict) else None
        if not isinstance(said, str) or kind not in (*TEXTS, "thinking", "reasoning", None):
            raise BadRow(
                f"message {number} holds a part of type {kind}; this program trains text alone, in parts of type text"
            )
        (thoughts if kind in ("thinking", "reasoning") else texts).append(said)
    return "\n".join(texts), "\n".join(thoughts)


def _options(options: Any) -> dict[str, Any]:
    """chat_template_kwargs, as trl has them."""
    if checks.empty(options):
        return {}
    taken = {"messages", "tools", "conversation", "add_generation_prompt", "tokenize", "chat_template", "strftime_now"}
    if not isinstance(options, dict) or taken & set(options):
        raise BadRow(
            'chat_template_kwargs is no object of options for the chat template, such as {"enable_thinking": false}'
        )
    if wrong := checks.bad_characters(json.dumps(options, ensure_ascii=False, default=str)):
        raise BadRow(f"chat_template_kwargs {wrong}")
    return {str(key): value for key, value in options.items() if value is not None}


def _with_system(turns: list[Turn], system: Any, said: set[str]) -> list[Turn]:
    """The turns after a column's system prompt. Raises BadRow where they have another one."""
    text = said_text(system, "column system", said)
    if turns[0]["role"] in ("system", "developer"):
        if turns[0].get("content") in (text, ""):
            return [{**turns[0], "content": text}, *turns[1:]]
        raise BadRow("has a system prompt in column system and another one in its messages; it takes one")
    return [{"role": "system", "_written": "system", "content": text}, *turns]


def _weight(turn: Turn, number: int) -> int:
    """1, or 0 for a turn that is not to be trained. Taken out of the turn."""
    weights = [turn.pop(key) for key in WEIGHTS if key in turn]
    for weight in weights:
        if not checks.is_bare(weight) or weight not in (0, 1):
            raise BadRow(f"has a message of weight {short(str(weight))}; it takes 0 and 1")
    if len(set(weights)) > 1:
        raise BadRow(f"message {number} has {' and '.join(WEIGHTS)}, which differ; it takes one of them")
    return int(weights[0]) if weights else 1


def _in_order(turns: list[Turn]) -> None:
    """Raise BadRow where results come in another order than their calls: most templates write no ids. Ids are wires, not text."""
    waiting: list[Any] = []
    for number, turn in enumerate(turns, 1):
        if turn.get("tool_calls"):
            waiting = [call.get("id") for call in turn["tool_calls"]]
        elif turn["role"] == TOOL and turn.get("tool_call_id") in [name for name in waiting[1:] if name is not None]:
            raise BadRow(
                f"message {number} answers a later call before the first; give the results in the order of the calls"
            )
        elif turn["role"] == TOOL and waiting:
            waiting.pop(0)
