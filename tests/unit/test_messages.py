"""Conversations through the chat templates of the field, as trl ships them: nothing vanishes, and every answer is trained, no more."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from chats import ENDS, eos, tokens, trained, turn, words
from finetune.errors import SettingsError

# contents that stand in roles and headers too, with white space, tags and Chinese
CHAT = [
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "一个患有急性阑尾炎的病人\n\n  has <b>fever</b>."},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "user"},
]


@pytest.mark.parametrize("name", ENDS)
def test_every_answer_is_trained_with_its_end_and_nothing_else(tmp_path: Path, name: str) -> None:
    middle, last = ENDS[name]
    made = words(name, eos(name))
    answers = [turn["content"] for turn in CHAT if turn["role"] == "assistant"]
    found = trained(tokens(tmp_path, made, [{"messages": CHAT}]), made)
    # what a template writes at the head of an answer, which the model has to write too
    heads = r"\s*(?:<think>\s*</think>\s*|<\|channel\|>final<\|message\|>)?"
    ends = [middle, middle, "<|end|><|endoftext|>" if name == "phi3" else last]
    wanted = "".join(heads + re.escape(answer + end) for answer, end in zip(answers, ends, strict=True))
    assert re.fullmatch(wanted, found.strip()), found


ASKED, SAID = turn("user", "Weather in SF?"), turn("assistant", "18 degrees.")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where?"}}},
    },
}
CALL = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "SF"}}}]


@pytest.mark.parametrize(
    ("template", "row", "why"),
    [
        ("deepseek_r1_distill", dict(messages=[turn("critic", "What is it?"), SAID]), r"content of message 1 \(role critic\)"),
        ("qwen3", dict(messages=[ASKED, turn("critic", "18C"), SAID]), r"content of message 2 \(role critic\)"),
        ("deepseek_r1_distill", dict(messages=[turn("system", "One."), turn("system", "Two."), ASKED, SAID]), "message 1|message 2"),
        ("deepseek_r1_distill", dict(messages=[ASKED, turn("assistant", "Let me see.", tool_calls=CALL), SAID]), "message 2 calls a tool|leaves out a tool call of message 2"),
        ("deepseek_r1_distill", dict(messages=[ASKED, SAID], tools=[TOOL]), "has tools, and the model.s chat template has no place"),
        ("qwen3", dict(messages=[ASKED, SAID], tools=[{"type": "function"}]), "has tools without a name"),
        ("qwen3", dict(messages=[turn("system", "Be kind."), ASKED, SAID], system="Answer in French."), "in column system and another one"),
        ("gemma3", dict(messages=[ASKED, turn("assistant", "a"), ASKED, SAID], tools=[TOOL]), "has tools, and the model.s chat template has no place"),
        ("gptoss", dict(messages=[ASKED, turn("assistant", "a", reasoning="R1"), ASKED, SAID]), "leaves out the reasoning of message 2 .*KEEP_REASONING=template"),
        ("qwen3", dict(messages=[ASKED, turn("assistant", None)]), "content of message 2 is null"),
        ("qwen3", dict(messages=[turn("user", [{"type": "image_url"}]), SAID]), "part of type image_url"),
        ("qwen3", dict(messages=[ASKED, SAID], images=["a.png"]), "has images beside its text"),
        ("qwen3", dict(messages=[ASKED, turn("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), SAID]), "arguments of f are not JSON"),
        ("qwen3", dict(messages=[ASKED, {**SAID, "weight": 0.5}]), "weight 0.5; it takes 0 and 1"),
        ("llama3", dict(messages=[ASKED, turn("assistant", "<think></think>")]), "message 2 says nothing"),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out_ends_the_run_with_its_row(
    tmp_path: Path, template: str, row: Any, why: str
) -> None:
    made = words(template, ENDS[template][1])
    fine = {"messages": [ASKED, SAID]}
    with pytest.raises(SettingsError, match=rf"rows.jsonl row 2 \(line 2\): .*({why})"):
        tokens(tmp_path, made, [fine, row, fine], TRAIN_ON="all")
    assert len(tokens(tmp_path, made, [fine, row, fine], TRAIN_ON="all", DROP_BAD_ROWS="1").dataset) == 2


def test_a_message_of_weight_0_is_not_trained(tmp_path: Path) -> None:
    made = words("qwen3", "<|im_end|>")
    row = dict(
        messages=[
            turn("user", "Capital of France?"),
            turn("assistant", "Paris", weight=0),
            ASKED,
            {**SAID, "weight": 1},
        ]
    )
    assert "Paris" not in trained(tokens(tmp_path, made, [row]), made)
    everything = tokens(tmp_path, made, [row], TRAIN_ON="all")
    found = trained(everything, made)
    assert "Paris" not in found and "Capital of France?" in found and "18 degrees." in found
    assert any("1 rows have messages of weight 0" in note for note in everything.notes)


def test_a_row_that_a_template_refuses_is_named_and_may_be_dropped(tmp_path: Path) -> None:
    made = words("gemma3", "<end_of_turn>")  # it wants turns of user and assistant by turns
    rows = [{"messages": [ASKED, SAID]}, {"messages": [ASKED, ASKED, SAID]}]
    with pytest.raises(SettingsError, match=r"row 2 \(line 2\): is refused by the model's chat template"):
        tokens(tmp_path, made, rows)
    assert len(tokens(tmp_path, made, rows, DROP_BAD_ROWS="1").dataset) == 1


def test_a_special_token_written_in_a_message_is_text_and_an_end_of_ones_own_is_taken_out(tmp_path: Path) -> None:
    made = words("qwen2_5", "<|im_end|>")
    chat = [turn("user", "What is <|im_start|>?"), turn("assistant", "It ends with <|im_end|>, or not.<|im_end|>")]
    found = tokens(tmp_path, made, [{"messages": chat}])
    assert trained(found, made) == "It ends with <|im_end|>, or not.<|im_end|>"
    ids = found.dataset[0]["input_ids"]
    assert ids.count(made.eos_token_id) == 3  # the system prompt's, the user's and the assistant's own
    assert any("BOS or EOS of their own" in note for note in found.notes)
    assert any("1 rows hold the text of special tokens" in note for note in found.notes)


def test_where_a_question_is_cut_no_end_is_trained(tmp_path: Path) -> None:
    made = words("qwen2_5", "<|im_end|>")
    row = dict(messages=[ASKED, SAID, turn("user", "long " * 200), SAID])
    found = tokens(tmp_path, made, [row], MAX_SEQ_LENGTH="100")
    assert found.truncated == 1 and trained(found, made) == "18 degrees.<|im_end|>"


def test_the_date_of_a_template_is_the_runs(tmp_path: Path) -> None:
    made = words("llama3_1", "<|eot_id|>")
    made.chat_template = made.chat_template.replace(
        '"26 Jul 2024"', 'strftime_now("%d %b %Y")'
    )  # as Llama 3.1's own has it
    assert "strftime_now" in made.chat_template
    found = tokens(tmp_path, made, [{"messages": [ASKED, SAID]}])
    assert "Today Date: 26 Jul 2024" in made.decode(found.dataset[0]["input_ids"]) and found.date == "2024-07-26"
    other = words("qwen3", "<|im_end|>")
    assert tokens(tmp_path, other, [{"messages": [ASKED, SAID]}]).date is None


def test_an_answer_that_stands_in_other_words_too_is_found_where_it_is(tmp_path: Path) -> None:
    """Nemotron's template writes <think></think> before an answer, unless the answer holds one of them: its text depends on the row."""
    made = words("nemotron_3_nano", "<|im_end|>")
    chat = [turn("user", "e"), turn("assistant", "e"), turn("user", "is"), turn("assistant", "<think>is")]
    found = trained(tokens(tmp_path, made, [{"messages": chat}]), made)
    assert re.fullmatch(r"(<think></think>)?e<\|im_end\|><think>is<\|im_end\|>", found), found


# as in templates of Mistral's: the system prompt stands in the last question
MOVED = (
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
    "{% if m == asked[-1] and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_system_prompt_that_the_template_moves_is_no_loss(tmp_path: Path) -> None:
    made = words("qwen2_5", "<|im_end|>")
    made.chat_template = MOVED
    row = dict(messages=[turn("system", "Be kind."), turn("user", "a"), turn("assistant", "b"), ASKED, SAID])
    assert trained(tokens(tmp_path, made, [row]), made) == " b<|im_end|> 18 degrees.<|im_end|>"


def test_a_message_that_a_template_drops_for_what_it_says_is_named(tmp_path: Path) -> None:
    made = words("qwen2_5", "<|im_end|>")
    made.chat_template = "{% for m in messages if m.content != 'b' %}{{ m.role }}: {{ m.content }}\nab\n{% endfor %}"
    row = dict(messages=[turn("user", "a"), turn("assistant", "b"), ASKED, SAID])
    with pytest.raises(SettingsError, match=r"leaves out or rewrites the content of message 2 \(role assistant\): b"):
        tokens(tmp_path, made, [row])
    made.chat_template = made.chat_template.replace("{{ m.content }}", "{{ m.content }} {{ m.content }}").replace(
        "b'", "'"
    )
    with pytest.raises(SettingsError, match=r"writes the content of message 1 \(role user\): a more than once"):
        tokens(tmp_path, made, [row])
