"""Random conversations through the chat templates of the field: what the assistant says is trained, once, and nothing else is."""

from __future__ import annotations

import collections
import datetime
import json
import random
import re
from importlib import resources
from typing import Any

import pytest

import chats
from finetune import data
from finetune.data.encoder import Encoder
from finetune.data.formats.messages import Messages
from finetune.data.kept import Guard
from finetune.settings import Settings

ROWS = 25
# (row, what the assistant says, what others say)
Case = tuple[dict[str, Any], list[str], list[str]]
# the kinds of rows that a template must take, of: plain, system, tools, reasoning
TAKES = {
    "qwen2_5": "plain system tools reasoning",
    "qwen3": "plain system tools reasoning",
    "qwen3_instruct_2507": "plain system tools reasoning",
    "qwen3_5_think": "plain system tools reasoning",
    "qwen3_6": "plain system tools reasoning",
    "glm4moe": "plain system tools reasoning",
    "lfm2_2_5": "plain system tools reasoning",
    "nemotron_3_nano": "plain system tools reasoning",
    "llama3": "plain system reasoning",
    "llama3_1": "plain system tools reasoning",
    "deepseek_r1_distill": "plain system reasoning",
    "gemma3": "plain system reasoning",
    "phi3": "plain system reasoning",
    "phi4": "plain system reasoning",
    "llama2": "plain system reasoning",
    "smollm2": "plain system reasoning",
    "mistral": "plain tools reasoning",
    "gptoss": "plain system tools",
}


class Talk:
    """Makes conversations in which each thing said holds a word of its own."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.count = 0

    def says(self, words: list[str]) -> str:
        self.count += 1
        words.append(f"word{self.count}e")
        beginnings = [
            "",
            '"q" ',
            "it's ",
            "一个病人 ",
            "a\n\nb ",
            "<b> ",
            '{"x": 1} ',
            "<|im_start|> ",
            "user ",
            "</tool_call> ",
        ]
        return self.random.choice(beginnings) + words[-1]

    def row(self, kinds: set[str]) -> Case:
        chance, said, others = self.random.random, list[str](), list[str]()
        turns: list[dict[str, Any]] = []
        row: dict[str, Any] = {"messages": turns}
        if "system" in kinds:
            turns.append(chats.turn("system", self.says(others)))
        if "tools" in kinds:
            city = {"type": "string", "description": self.says(others)}
            parameters = {
                "type": "object",
                "properties": {"city": city, "days": {"type": "integer"}},
                "required": ["city"],
            }
            function = {"name": "weather", "description": self.says(others), "parameters": parameters}
            row["tools"] = self.random.choice([[{"type": "function", "function": function}], json.dumps([function])])
        for number in range(self.random.randint(1, 3)):
            asked: Any = self.says(others)
            if chance() < 0.3:
                asked = [{"type": "text", "text": asked}, {"type": "text", "text": self.says(others)}]
            turns.append(chats.turn(self.random.choice(["user", "human"]), asked))
            if "tools" in kinds and chance() < 0.7:
                turns += self.call(f"abcdefg{number:02d}", said, others, "reasoning" in kinds)
            answer, more = self.says(said), {}
            if "reasoning" in kinds and chance() < 0.6:
                thought = self.says(said)
                if chance() < 0.5:
                    answer = f"<think>\n{thought}\n</think>\n\n{answer}"
                else:
                    more = {self.random.choice(["reasoning_content", "reasoning", "thinking"]): thought}
            content = [{"type": "text", "text": answer}] if chance() < 0.2 else answer
            turns.append(chats.turn(self.random.choice(["assistant", "gpt"]), content, **more))
        return row, said, others

    def call(self, name: str, said: list[str], others: list[str], thinks: bool) -> list[dict[str, Any]]:
        arguments = {"city": self.says(said), "days": self.random.randint(1, 9)}
        given = self.random.choice([arguments, json.dumps(arguments)])
        calls = [{"id": name, "type": "function", "function": {"name": "weather", "arguments": given}}]
        content: dict[str, Any] = self.random.choice([{}, {"content": None}, {"content": ""}])
        thought = {"reasoning_content": self.says(said)} if thinks and self.random.random() < 0.3 else {}
        result = chats.turn(self.random.choice(["tool", "observation"]), self.says(others), tool_call_id=name)
        return [{"role": "assistant", "tool_calls": calls, **content, **thought}, result]


def encoder(template: str, **values: str) -> tuple[Encoder, Any]:
    made = chats.words(template, chats.eos(template))
    settings = Settings.from_env({"TRAIN_ON": "response", "MAX_SEQ_LENGTH": "100000", **values})
    form = Messages.of(settings, made, datetime.date(2024, 7, 26))
    return Encoder(form, made, Guard.of(made), 100000, True), made


def parts(row: dict[str, Any], tokenizer: Any) -> tuple[str, str]:
    """What is trained, and what is not."""
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    return tuple(  # type: ignore[return-value]
        tokenizer.decode([token for token, label in pairs if (label != data.IGNORE_INDEX) == trained])
        for trained in (True, False)
    )


@pytest.mark.parametrize("template", TAKES)
def test_all_that_the_assistant_says_is_trained_once_and_nothing_else(template: str) -> None:
    work, tokenizer = encoder(template)
    talk, taken, kinds = Talk(7), collections.Counter[str](), TAKES[template].split()
    for _ in range(ROWS):
        chosen = {kind for kind in ("system", "tools", "reasoning") if talk.random.random() < 0.4}
        row, said, others = talk.row(chosen)
        out = work(row)
        if out["problem"]:
            # what a template has no place for, or what it is not told to keep, is named; nothing else is refused
            told = r"chat template (has no place|leaves out (the reasoning|the content of message 1 \(role system\)))|cannot be told to keep"
            assert re.search(told, out["problem"]), out["problem"]
            continue
        taken.update(chosen or {"plain"})
        trained, rest = parts(out, tokenizer)
        for word in said:
            assert (trained.count(word), rest.count(word)) == (1, 0), (row, word, trained)
        for word in others:
            assert trained.count(word) == 0 and rest.count(word) >= 1, (row, word, trained)
    assert all(taken[kind] >= 2 for kind in kinds), taken


SHORT = [
    "a",
    "user",
    "assistant",
    "e",
    "is",
    "model",
    "end",
    "A b\n\nc",
    "一",
    ".",
    "im_start",
    "So.",
    "Why?",
    "<b>x</b>",
    "QxsaidxQ",
]
MASKED = ["cohere2", "deepseek_r1_distill", "gemma3", "glm4moe", "gptoss", "lfm2", "llama3", "nemotron_3_nano", "phi3", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_instruct_2507"]  # fmt: skip


@pytest.mark.parametrize("template", MASKED)
def test_words_that_stand_everywhere_are_trained_where_trls_masks_are(template: str) -> None:
    """Their training templates mark with {% generation %} what is trained. They also mark the empty thought, and what asks."""
    assert resources.files("trl").joinpath(f"chat_templates/{template}_training.jinja").is_file()
    work, tokenizer = encoder(template)
    theirs = chats.words(template, chats.eos(template))
    theirs.chat_template = chats.source(f"{template}_training")
    draw = random.Random(3)
    for _ in range(ROWS):
        turns = [
            chats.turn(role, draw.choice(SHORT)) for _ in range(draw.randint(1, 4)) for role in ("user", "assistant")
        ]
        trained, _ = parts(work({"messages": turns}), tokenizer)
        found = theirs.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        masked = theirs.decode([i for i, use in zip(found["input_ids"], found["assistant_masks"], strict=True) if use])
        bare = [
            re.sub(
                r"\s+|<think>\s*</think>|<\|start\|>assistant|<｜Assistant｜>|(<\|user\|>|<\|endoftext\|>)$", "", text
            )
            for text in (trained, masked)
        ]
        assert bare[0] == bare[1], turns


def anything(draw: random.Random, depth: int = 0) -> Any:
    """A value as JSON may hold it."""
    kind = draw.random()
    if kind < 0.5 or depth > 3:
        said = [
            "user",
            "",
            "  ",
            '{"name": "f", "arguments": {"a": 1}}',
            "[",
            "<think>x</think>y",
            "\n</think>\n",
            "<|im_end|>",
            "\ud800",
            "it's",
        ]
        return draw.choice(said)
    if kind < 0.65:
        return draw.choice([None, True, 0, 2.5, float("nan"), 10**30])
    inner = [anything(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    names = ["name", "arguments", "type", "text", "content", "function", "description", "properties"]
    return inner if kind < 0.8 else {draw.choice(names): value for value in inner}


@pytest.mark.parametrize("template", ["qwen3", "deepseek_r1_distill", "gptoss", "mistral"])
def test_whatever_a_row_holds_it_is_trained_or_told_why_not(template: str) -> None:
    draw, (work, _) = random.Random(11), encoder(template, KEEP_REASONING="template")
    fields = [
        "role",
        "from",
        "content",
        "value",
        "tool_calls",
        "function_call",
        "weight",
        "train",
        "name",
        "reasoning",
        "thinking",
        "x",
        "id",
    ]
    taken = 0
    for _ in range(400):
        turns: list[Any] = [chats.turn(role, "So.") for role in ("user", "assistant") * draw.randint(1, 2)]
        row: dict[str, Any] = {"messages": turns}
        changed = draw.choice(turns)
        for _ in range(draw.randint(1, 2)):
            changed[draw.choice(fields)] = anything(draw)
        beside = draw.choice(["system", "tools", "chat_template_kwargs", "other", "other"])
        row[beside] = draw.choice(
            [anything(draw), [{"name": "f", "description": anything(draw), "parameters": anything(draw)}]]
        )
        if Messages.problem(row, Settings()) is None:
            out = work(row)
            assert out["problem"] or any(label != data.IGNORE_INDEX for label in out["labels"]), row
            taken += not out["problem"]
    assert taken > 20
