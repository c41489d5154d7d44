"""The forms that rows have, as people have them: which is recognised, what is trained of it, and how a question is asked."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

import chats
from chats import tokens, trained, turn
from finetune import data
from finetune.data import formats, shown
from finetune.errors import SettingsError
from finetune.settings import Settings

QWEN, QWEN3, R1 = "qwen2_5", "qwen3", "deepseek_r1_distill"
END = "<|im_end|>"
STOP = "<｜end▁of▁sentence｜>"
ASKED, SAID = turn("user", "2+2?"), turn("assistant", "Four.")
CALLED = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "SF"}'}}
TOOL_CALL = {"name": "get_weather", "arguments": {"city": "SF"}}
TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "SF"}}\n</tool_call>' + END
WEATHER = [
    turn("user", "Weather?"),
    dict(role="assistant", tool_calls=[CALLED]),
    turn("tool", "18C", tool_call_id="c1"),
    turn("assistant", "18."),
]
NO_THOUGHT = "<think>\n\n</think>\n\n"
R1_TURN = turn("assistant", "Four.", reasoning_content="R1")
R1_TEXT = "<think>\nR1\n</think>\n\nFour."
TEN = [
    turn(role, f"{what} number {number}.")
    for number in range(10)
    for role, what in (("user", "Question"), ("assistant", "Answer"))
]


def words(template: str) -> Any:
    return chats.words(template, chats.eos(template))


def text(made: data.Tokens, tokenizer: Any) -> str:
    return str(tokenizer.decode(made.dataset[0]["input_ids"]))


def messages(*turns: Any, **beside: Any) -> dict[str, Any]:
    return dict(messages=list(turns), **beside)


@pytest.mark.parametrize(
    ("template", "row", "wanted"),
    [
        # the smallest inputs that went wrong in silence, or were refused, each with what is trained of it
        (R1, messages(turn("human", "What is it?"), turn("assistant", "This.")), f"This.{STOP}"),
        (QWEN3, messages(*TEN), "".join(f"Answer number {n}.{END}" for n in range(9)) + f"{NO_THOUGHT}Answer number 9.{END}"),
        ("phi3", messages(*TEN), "".join(f"Answer number {n}.<|end|>" for n in range(10)) + "<|endoftext|>"),
        (QWEN, messages(*WEATHER, tools=[{"type": "function", "function": TOOL}]), f"{CALL}18.{END}"),
        (QWEN, messages(*WEATHER, tools=json.dumps([TOOL])), f"{CALL}18.{END}"),
        (QWEN, messages(WEATHER[0], {**WEATHER[1], "content": None}, *WEATHER[2:], functions=[TOOL]), f"{CALL}18.{END}"),
        (QWEN, messages(WEATHER[0], {**WEATHER[1], "content": ""}, *WEATHER[2:]), f"{CALL}18.{END}"),
        (QWEN, messages(WEATHER[0], {**WEATHER[1], "content": "Let me see."}, *WEATHER[2:]), f"Let me see.\n{CALL}18.{END}"),
        (QWEN, messages(WEATHER[0], dict(role="assistant", function_call=CALLED["function"]), turn("function", "18C", name="get_weather"), WEATHER[3]), f"{CALL}18.{END}"),
        (R1, messages(ASKED, SAID, system="Be kind."), f"Four.{STOP}"),
        (QWEN, dict(messages=json.dumps([ASKED, SAID])), f"Four.{END}"),
        (QWEN, messages({**ASKED, "tool_calls": None}, {**SAID, "tool_calls": None}), f"Four.{END}"),
        (QWEN, messages(turn("user", "Capital?"), turn("assistant", "Paris", weight=0), turn("user", "Be sarcastic."), turn("assistant", "Paris!", weight=1)), f"Paris!{END}"),
        (QWEN, messages(turn("user", "Capital?"), turn("assistant", "Paris", train=False), ASKED, SAID), f"Four.{END}"),
        (R1, messages(ASKED, R1_TURN), f"{R1_TEXT}{STOP}"),
        (R1, messages(ASKED, turn("assistant", R1_TEXT)), f"{R1_TEXT}{STOP}"),
        (R1, messages(ASKED, turn("assistant", "R1\n</think>\n\nFour.")), f"{R1_TEXT}{STOP}"),
        (R1, messages(ASKED, turn("assistant", f"{NO_THOUGHT}Four.")), f"{NO_THOUGHT}Four.{STOP}"),
        (QWEN, messages(ASKED, turn("assistant", "R1\n</think>\n\nFour.")), f"R1\n</think>\n\nFour.{END}"),
        (QWEN, messages(ASKED, turn("assistant", "A thought ends with </think> and a line.")), f"A thought ends with </think> and a line.{END}"),
        (QWEN, messages(ASKED, SAID, ASKED, turn("assistant", "No.", weight=0)), f"Four.{END}"),
        (QWEN, messages(WEATHER[0], dict(role="assistant", tool_calls=[TOOL_CALL, TOOL_CALL]), turn("tool", "a"), turn("tool", "b"), SAID), f"{CALL.removesuffix(END)}\n{CALL}Four.{END}"),
        (QWEN, messages(ASKED, R1_TURN), f"{R1_TEXT}{END}"),
        (QWEN3, messages(ASKED, R1_TURN, ASKED, SAID), f"{R1_TEXT}{END}{NO_THOUGHT}Four.{END}"),
        ("gptoss", messages(ASKED, R1_TURN), "<|channel|>analysis<|message|>R1<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"),
        ("gptoss", messages(ASKED, turn("assistant", R1_TEXT)), "<|channel|>analysis<|message|>R1<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"),
        (QWEN, messages(turn("assistant", "Welcome"), turn("user", "Hi"), turn("assistant", "Hello")), f"Welcome{END}Hello{END}"),
        (QWEN, messages(turn("user", [dict(type="text", text="2"), dict(type="text", text="+2?")]), turn("assistant", [dict(type="text", text="Four.", image_url=None)])), f"Four.{END}"),
        (QWEN, messages(ASKED, turn("assistant", [dict(type="thinking", thinking="R1"), dict(type="text", text="Four.")])), f"{R1_TEXT}{END}"),
        (QWEN, dict(conversations=[{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]), f"Hello.{END}"),
        (QWEN, dict(conversation=[turn("user", "Hi"), turn("assistant", "Hello.")]), f"Hello.{END}"),
        (QWEN, dict(conversations=[{"from": "human", "value": "Weather?"}, {"from": "function_call", "value": json.dumps(dict(name="get_weather", arguments=dict(city="SF")))}, {"from": "observation", "value": "18C"}, {"from": "gpt", "value": "18."}], system="Be kind.", tools=json.dumps([TOOL])), f"{CALL}18.{END}"),
        (QWEN, dict(instruction="Give three tips.", input="", output="Eat well."), f"Eat well.{END}"),
        (QWEN, dict(instruction="Translate.", input="Hello", output="Bonjour", system="Be kind.", history=[["Hi", "Hello."]]), f"Hello.{END}Bonjour{END}"),
        (QWEN, dict(prompt="http:", completion="//x.org"), f"//x.org{END}"),
        (QWEN, dict(prompt="", completion="All."), f"All.{END}"),
        (QWEN, dict(prompt=[turn("user", "Hi"), turn("assistant", "Hello."), ASKED], completion=[SAID]), f"Four.{END}"),
    ],
)  # fmt: skip
def test_what_is_trained(tmp_path: Path, template: str, row: Any, wanted: str) -> None:
    made = words(template)
    found = tokens(tmp_path, made, [row])
    assert trained(found, made) == wanted
    for said in ("Be kind.", "Translate.\nHello"):
        assert (said in text(found, made)) == (said.split("\n")[0] in json.dumps(row)), text(found, made)


def test_a_token_across_the_border_of_prompt_and_answer_is_trained(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    made = words(QWEN)
    made.add_tokens(AddedToken("://", special=False, normalized=False))
    assert trained(tokens(tmp_path, made, [dict(prompt="http:", completion="//x.org")]), made) == f"://x.org{END}"


@pytest.mark.parametrize(
    ("row", "values", "form"),
    [
        (dict(messages=[ASKED, SAID], prompt="x", text="y"), {}, "messages"),
        (dict(conversations=[ASKED, SAID], text="y", id=1), {}, "sharegpt"),
        (dict(instruction="a", input="", output="b", text="c"), {}, "alpaca"),
        (dict(instruction="a", output="b"), dict(PROMPT_TEMPLATE="alpaca"), "alpaca"),
        (dict(prompt="a", completion="b", source="c"), {}, "prompt_completion"),
        (dict(prompt=[ASKED], completion=[SAID]), {}, "prompt_completion_chat"),
        (dict(text="The sky is blue."), {}, "text"),
        # the default's columns are never taken for something else
        (dict(Question="a", Complex_CoT="b", Response="c", messages=[ASKED, SAID], text="d", instruction="e", output="f"), {}, "columns"),
        (dict(prompt="a", completion="b"), dict(PROMPT_COLUMNS="prompt", COMPLETION_COLUMNS="completion", PROMPT_TEMPLATE="two"), "columns"),
        (dict(messages=[ASKED, SAID], text="y"), dict(DATASET_FORMAT="text"), "text"),
        (dict(messages=[ASKED, SAID], images=[]), {}, "messages"),
        (dict(prompt="a", completion="b", label=True), dict(DATASET_FORMAT="prompt_completion"), "prompt_completion"),
    ],
)  # fmt: skip
def test_the_form_is_recognised_and_said(tmp_path: Path, capsys: Any, row: Any, values: Any, form: str) -> None:
    (tmp_path / "two").write_text("{}: {}")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    values = {name: str(tmp_path / "two") if value == "two" else value for name, value in values.items()}
    found = data.load(Settings.from_env({"DATASET_NAME": str(tmp_path / "rows.jsonl"), **values}))
    assert found.format == form
    line = next(line for line in capsys.readouterr().out.splitlines() if f"rows of form {form}" in line)
    unread = [column for column in row if column not in formats.FORMATS[form].reads(Settings.from_env(values))]
    assert line.endswith(f"not trained: {', '.join(unread)}") if unread else "not trained" not in line


CHAT = messages(ASKED, SAID)


@pytest.mark.parametrize(
    ("row", "values", "why"),
    [
        (CHAT, dict(COMPLETION_COLUMNS="Complex_CoT,Respnse"), r"COMPLETION_COLUMNS is for rows with columns, .* have no .*Respnse, but a list of messages"),
        (CHAT, dict(PROMPT_TEMPLATE="two"), "Leave out PROMPT_TEMPLATE to train them as DATASET_FORMAT=messages"),
        (CHAT, dict(PROMPT_TEMPLATE="two", DATASET_FORMAT="messages"), "DATASET_FORMAT=messages with PROMPT_TEMPLATE: only rows with columns take it"),
        (CHAT, dict(PROMPT_TEMPLATE="alpaca"), "Leave out PROMPT_TEMPLATE"),
        (CHAT, dict(DATASET_FORMAT="sharegpt"), "row 1 .*has no list of conversations"),
        (CHAT, dict(DATASET_FORMAT="columns"), "has no column Question; its columns are messages"),
        (dict(q="a", a="b"), {}, "every row needs text in Question.* Name other columns .* a list of conversations, or instruction and output"),
        (dict(q="a", a="b"), dict(PROMPT_COLUMNS="q", COMPLETION_COLUMNS="a", PROMPT_TEMPLATE="chat"), "PROMPT_TEMPLATE=chat: is for rows with instruction"),
        (dict(prompt="a", completion="b", label=False), {}, "label rate answers"),
        (dict(prompt="a", chosen="b", rejected="c"), {}, "chosen and rejected rate answers.*COMPLETION_COLUMNS=chosen"),
        (dict(instruction="a", output="b", kto_tag=False), {}, "kto_tag rate answers"),
        (dict(CHAT, images=None), {}, "has a column images"),
        (dict(text="a"), dict(TRAIN_ON="last"), "TRAIN_ON=last: rows of plain text have no answer"),
        (dict(prompt="a", completion="b", tools=[TOOL]), {}, "has tools beside a prompt that is text"),
        (dict(prompt=[ASKED], completion="b"), {}, "has no list of completion"),
        (dict(instruction="a", output=None), {}, "column output is null"),
        (dict(instruction="", input="", output="b"), {}, "column instruction is empty"),
        (dict(instruction="a", output="b", history=["c"]), {}, "history 1 is no pair"),
        (dict(prompt="a", completion={"b": 1}), {}, "column completion is an object, not text"),
        (dict(text=float("nan")), {}, "is no number that JSON has"),
        (messages(WEATHER[0], dict(role="assistant", tool_calls=[CALLED, {**CALLED, "id": "c2"}]), turn("tool", "a", tool_call_id="c2"), SAID), {}, "message 3 answers a later call before the first"),
        (messages(*WEATHER, tools=json.dumps([{**TOOL, "description": "a \ud800 b"}])), {}, "tools has half a character"),
        (messages(*WEATHER, tools=[{**TOOL, "parameters": {"type": "object", "title": END}}]), {}, "holds the text of a special token in a tool"),
        (messages(ASKED, {**SAID, "weight": 1, "train": False}), {}, "message 2 has weight and train"),
        (messages({**ASKED, "tool_calls": [CALLED]}, SAID), {}, "only the assistant does"),
        (dict(conversations=[{"from": "human", "value": "a"}, {"from": "function_call", "value": "get_weather()"}, {"from": "gpt", "value": "b"}]), {}, "message 2 calls a tool, but is text"),
        (messages(ASKED, {**SAID, "reasoning": "a", "thinking": "b"}), {}, "reasoning and thinking, which differ"),
        (messages(ASKED, SAID, chat_template_kwargs={"tokenize": True}), {}, "chat_template_kwargs is no object of options"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(tmp_path: Path, row: Any, values: Any, why: str) -> None:
    (tmp_path / "two").write_text("{}: {}")
    values = {name: str(tmp_path / "two") if value == "two" else value for name, value in values.items()}
    with pytest.raises(SettingsError, match=rf"(?s){why}"):
        tokens(tmp_path, words(QWEN), [row], **{"TRAIN_ON": "all", **values})


CLASSIC = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\nTranslate.\n\n### Input:\nHello\n\n### Response:\nBonjour"
)


def test_alpacas_own_text_where_there_is_no_chat_template_or_it_is_asked_for(tmp_path: Path) -> None:
    made = words(QWEN)
    row = dict(instruction="Translate.", input="Hello", output="Bonjour")
    found = tokens(tmp_path, made, [row], PROMPT_TEMPLATE="alpaca")
    assert text(found, made) == CLASSIC + END and trained(found, made) == f"\nBonjour{END}"
    made.chat_template = None
    assert tokens(tmp_path, made, [row]).sha256 == found.sha256
    bare = tokens(tmp_path, made, [dict(row, input=None, output=4, system="Be kind.")])
    assert text(bare, made) == f"### System:\nBe kind.\n\n### Instruction:\nTranslate.\n\n### Response:\n4{END}"
    with pytest.raises(SettingsError, match="has history, for which Alpaca's text has no place"):
        tokens(tmp_path, made, [dict(row, history=[["a", "b"]])])
    with pytest.raises(SettingsError, match="has no chat template"):
        tokens(tmp_path, made, [row], PROMPT_TEMPLATE="chat")


@pytest.mark.parametrize(
    ("row", "values"),
    [
        (messages(turn("user", "Why?"), SAID), {}),
        (dict(conversations=[{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]), {}),
        (dict(instruction="Why?", output="So."), {}),
        (dict(instruction="Why?", output="So."), {"PROMPT_TEMPLATE": "alpaca"}),
        (dict(prompt="Why?", completion=" So."), {}),
        (dict(prompt=[turn("user", "Why?")], completion=[SAID]), {}),
        (dict(text="Why? So."), {}),
    ],
)
def test_a_question_is_asked_in_the_form_that_was_trained(tmp_path: Path, row: Any, values: Any) -> None:
    made = words(QWEN)
    settings = Settings.from_env({"DATASET_NAME": str(tmp_path / "rows.jsonl"), **values})
    found = text(tokens(tmp_path, made, [row], TRAIN_ON="all", **values), made)
    form = data.format_of(data.load(settings).format, made, settings, datetime.date(2024, 7, 26))
    assert found.startswith(form.prompt("Why?")) and len(found) > len(form.prompt("Why?"))


def test_the_last_answer_alone(tmp_path: Path) -> None:
    made = words(QWEN)
    assert trained(tokens(tmp_path, made, [messages(*TEN)], TRAIN_ON="last"), made) == f"Answer number 9.{END}"
    assert trained(tokens(tmp_path, made, [messages(*WEATHER)], TRAIN_ON="last"), made) == f"18.{END}"
    with pytest.raises(SettingsError, match="has no assistant's message that is trained"):
        tokens(tmp_path, made, [messages(ASKED, SAID, ASKED, {**SAID, "weight": 0})], TRAIN_ON="last")


def test_all_of_a_conversational_prompt_is_trained_where_all_is(tmp_path: Path) -> None:
    made = words(QWEN)
    row = dict(prompt=[turn("user", "Hi"), turn("assistant", "Hello.")], completion=[ASKED, SAID])
    found = tokens(tmp_path, made, [row], TRAIN_ON="all")
    assert trained(found, made) == text(found, made)


THOUGHT = [
    ASKED,
    turn("assistant", "<think>\nFirst.\n</think>\n\nOne."),
    ASKED,
    turn("assistant", "Two.", reasoning_content="Second."),
]
FIRST, SECOND = "<think>\nFirst.\n</think>\n\n", "<think>\nSecond.\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "keeps", "wanted", "note"),
    [
        (R1, "auto", f"{FIRST}One.{STOP}{SECOND}Two.{STOP}", "written as <think>…</think> before its answer"),
        (R1, "last", f"One.{STOP}{SECOND}Two.{STOP}", "hold reasoning that is left out, as KEEP_REASONING says"),
        (R1, "template", f"\n\nOne.{STOP}Two.{STOP}", "hold reasoning that is left out, as KEEP_REASONING says"),
        (QWEN3, "auto", f"{FIRST}One.{END}{SECOND}Two.{END}", "written as <think>…</think> before its answer"),
        (QWEN3, "last", f"One.{END}{SECOND}Two.{END}", "hold reasoning that is left out, as KEEP_REASONING says"),
        (QWEN3, "template", f"One.{END}{SECOND}Two.{END}", "hold reasoning that is left out, as KEEP_REASONING says"),
        ("qwen3_6", "auto", f"{FIRST}One.{END}{SECOND}Two.{END}", "unless it is told to keep it, as it was here"),
        (
            "qwen3_6",
            "template",
            f"One.{END}{SECOND}Two.{END}",
            "hold reasoning that is left out, as KEEP_REASONING says",
        ),
        (QWEN, "template", f"{FIRST}One.{END}Two.{END}", "hold reasoning that is left out, as KEEP_REASONING says"),
    ],
)
def test_no_reasoning_is_lost_in_silence(tmp_path: Path, template: str, keeps: str, wanted: str, note: str) -> None:
    made = words(template)
    found = tokens(tmp_path, made, [messages(*THOUGHT)], KEEP_REASONING=keeps)
    assert trained(found, made) == wanted
    assert [each for each in found.notes if note in each and each.startswith("1 rows ")], found.notes
    assert not tokens(tmp_path, made, [messages(ASKED, SAID)], KEEP_REASONING=keeps).notes


def test_numbers_are_trained_as_json_writes_them_and_told(tmp_path: Path) -> None:
    made = words(QWEN)
    (tmp_path / "two.txt").write_text("{} = {}")
    own = dict(PROMPT_COLUMNS="q", COMPLETION_COLUMNS="a", PROMPT_TEMPLATE=str(tmp_path / "two.txt"))
    rows = {
        "4": dict(prompt="2+2", completion=4),
        "true": dict(instruction="Is it?", output=True),
        "two": dict(instruction="1+1", output="two", history=[["2+2", 4]]),
        "0.5": messages(ASKED, turn("assistant", 0.5)),
    }
    for wanted, row in rows.items():
        found = tokens(tmp_path, made, [row])
        assert trained(found, made).endswith(wanted + END)
        assert any("1 rows hold numbers, true or false" in note for note in found.notes)
    found = tokens(tmp_path, made, [dict(q="2+2", a=4)], **own)
    assert trained(found, made) == f" 4{END}" and any("hold numbers" in note for note in found.notes)
    result = messages(WEATHER[0], WEATHER[1], turn("tool", {"degrees": 18}), SAID)
    assert '{"degrees": 18}' in text(tokens(tmp_path, made, [result]), made)


def test_an_input_may_be_empty_in_a_template_of_ones_own(tmp_path: Path) -> None:
    made = words(QWEN)
    (tmp_path / "three.txt").write_text("{}\n{}\n\n{}")
    own = dict(
        PROMPT_COLUMNS="instruction,input", COMPLETION_COLUMNS="output", PROMPT_TEMPLATE=str(tmp_path / "three.txt")
    )
    found = tokens(
        tmp_path, made, [dict(instruction="Tip?", input=empty, output="Eat.") for empty in ("", None)], **own
    )
    assert text(found, made) == f"Tip?\n\n\nEat.{END}"
    with pytest.raises(SettingsError, match="column output is empty"):
        tokens(tmp_path, made, [dict(instruction="Tip?", input="a", output="")], **own)


def test_special_tokens_in_plain_text(tmp_path: Path) -> None:
    made = words(QWEN)
    rendered = f"<|im_start|>user\nHi{END}\n<|im_start|>assistant\nHello.{END}\n"
    found = tokens(tmp_path, made, [dict(text=rendered)], TRAIN_ON="all")
    assert text(found, made) == rendered.rstrip() and found.dataset[0]["input_ids"].count(made.eos_token_id) == 2
    assert any("read as such" in note for note in found.notes)
    ended = tokens(tmp_path, made, [dict(text=f"The sky is {END} blue.{END}")], TRAIN_ON="all")
    assert ended.dataset[0]["input_ids"].count(made.eos_token_id) == 1 and len(ended.notes) == 2
    with pytest.raises(SettingsError, match="holds nothing but"):
        tokens(tmp_path, made, [dict(text=END)], TRAIN_ON="all")


def test_a_text_that_is_nothing_but_an_eos_is_named(tmp_path: Path) -> None:
    for row in (dict(prompt="a", completion=END), dict(prompt=END, completion=END)):
        with pytest.raises(SettingsError, match=r"row 1 .*has a text that holds nothing but"):
            tokens(tmp_path, words(QWEN), [row])
    (tmp_path / "two.txt").write_text("{}\n{}")
    own = dict(PROMPT_COLUMNS="question", COMPLETION_COLUMNS="answer", PROMPT_TEMPLATE=str(tmp_path / "two.txt"))
    with pytest.raises(SettingsError, match=r"row 1 .*column answer holds nothing but"):
        tokens(tmp_path, words(QWEN), [dict(question=END, answer=END)], **own)


def test_html_that_looks_like_bos_and_eos_is_text(tmp_path: Path) -> None:
    made = words("llama2")
    made.bos_token, made.eos_token = "<s>", "</s>"
    row = dict(prompt="Strike out. ", completion="<p><s>$10</s> $5</p>")
    found = tokens(tmp_path, made, [row])
    assert (
        trained(found, made) == "<p><s>$10</s> $5</p></s>"
        and found.dataset[0]["input_ids"].count(made.eos_token_id) == 1
    )


def test_one_overlong_prompt_is_named_and_may_be_dropped(tmp_path: Path) -> None:
    rows = [dict(prompt="word " * 500, completion="a"), dict(prompt="a", completion="b")]
    with pytest.raises(SettingsError, match=r"row 1 \(line 1\): has nothing left to train on"):
        tokens(tmp_path, words(QWEN), rows, MAX_SEQ_LENGTH="50")
    assert tokens(tmp_path, words(QWEN), rows, MAX_SEQ_LENGTH="50", DROP_BAD_ROWS="1").dropped == 1


def test_what_parquet_writes_for_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    other = {
        "type": "function",
        "function": {"name": "other", "parameters": {"type": "object", "properties": {"days": {"type": "integer"}}}},
    }
    called = {**CALLED, "function": {"name": "get_weather", "arguments": {"city": "SF", "days": None}}}
    row = messages(
        WEATHER[0],
        dict(role="assistant", tool_calls=[called]),
        *WEATHER[2:],
        tools=[{"type": "function", "function": TOOL}, other],
    )
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    made = words(QWEN)
    settings = Settings.from_env({"DATASET_NAME": str(tmp_path / "rows.parquet"), "TRAIN_ON": "response"})
    found = data.tokenize(data.load(settings), made, settings)
    assert trained(found, made) == f"{CALL}18.{END}" and "null" not in text(found, made)
    assert any("hold null in tools" in note for note in found.notes)


def test_fields_that_the_template_does_not_write_are_told(tmp_path: Path) -> None:
    made = words(QWEN)
    found = tokens(tmp_path, made, [messages({**ASKED, "name": "Ann"}, SAID), messages(*WEATHER)])
    assert [note for note in found.notes if note.startswith("1 rows have fields in their messages")], found.notes
    made.chat_template = made.chat_template.replace("message.role +", "(message.name or message.role) +")
    named = tokens(tmp_path, made, [messages({**ASKED, "name": "Ann"}, SAID)])
    assert "<|im_start|>Ann\n2+2?" in text(named, made) and not named.notes


def test_a_special_token_in_a_tool_is_text(tmp_path: Path) -> None:
    made = words(QWEN)
    plain = messages(*WEATHER, tools=[{**TOOL, "description": "Ends."}])
    ends = [
        tokens(tmp_path, made, [row]).dataset[0]["input_ids"].count(made.eos_token_id)
        for row in (plain, json.loads(json.dumps(plain).replace("Ends.", END)))
    ]
    assert ends[0] == ends[1]


def test_a_role_that_the_template_knows_by_its_own_name_keeps_it(tmp_path: Path) -> None:
    made = words(QWEN)
    row = messages(turn("developer", "Be kind."), ASKED, SAID, turn("environment", "18C"), SAID)
    assert "<|im_start|>system\nBe kind." in text(tokens(tmp_path, made, [row]), made)
    made.chat_template = "{# 'environment' 'developer' #}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    found = text(tokens(tmp_path, made, [row]), made)
    assert "<|im_start|>developer\nBe kind." in found and "<|im_start|>environment\n18C" in found


def test_options_for_the_chat_template_stand_beside_the_messages(tmp_path: Path) -> None:
    made = words(QWEN)
    made.chat_template = "{{ tone }}" + made.chat_template
    assert text(
        tokens(tmp_path, made, [messages(ASKED, SAID, chat_template_kwargs={"tone": "Kindly."})]), made
    ).startswith("Kindly.")


def test_the_first_row_is_shown_as_it_is_trained(tmp_path: Path) -> None:
    made = words(QWEN)
    first = tokens(tmp_path, made, [messages(turn("user", "\x1b[31m发热?\u202e"), SAID, ASKED, SAID)]).first(made)
    assert first.endswith(
        f"<|im_start|>user\n\\x1b[31m发热?\\u202e{END}\n<|im_start|>assistant\n‹Four.{END}›\n"
        f"<|im_start|>user\n2+2?{END}\n<|im_start|>assistant\n‹Four.{END}›"
    )
    long = tokens(tmp_path, made, [dict(text="The sky is blue. " * 500)], TRAIN_ON="all", MAX_SEQ_LENGTH="9999").first(
        made
    )
    assert (
        long.startswith("‹The sky")
        and long.endswith(f"{END}›")
        and "characters …]" in long
        and len(long) < shown.LONGEST + 50
    )
