"""Rows, texts and tokens, with real tokenizers."""

from __future__ import annotations

import copy
import datetime
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

import tiny
from finetune import data
from finetune.errors import SettingsError
from finetune.settings import Settings
from finetune.sources.model import Source

ROW = {"Question": "What is it?", "Complex_CoT": "Let me think.", "Response": "It is this."}


def settings(**values: Any) -> Settings:
    return Settings.from_env({name: str(value) for name, value in values.items()})


def rows_file(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    text = (
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) if name.endswith("l") else json.dumps(rows)
    )
    path.write_text(text, errors="backslashreplace")  # a lone surrogate as JSON writes it
    return path


def loaded(path: Path, **values: Any) -> data.Rows:
    return data.load(settings(DATASET_NAME=path, **values))


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def words(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    tiny.tokenizer(request.param).save_pretrained(folder)
    return data.tokenizer(Source(request.param, None, folder))


def tokens(rows: data.Rows, words: Any, **values: Any) -> data.Tokens:
    return data.tokenize(rows, words, settings(DATASET_NAME=rows.name, **values))


def test_bundled_rows() -> None:
    both = data.load(settings(DATASET_NAME="samples"))
    assert both.seen == len(both.rows) >= 24 and both.dropped == 0
    chinese = data.load(settings(DATASET_NAME="samples", DATASET_CONFIG="zh", DATASET_SPLIT="train[:5]"))
    assert len(chinese.rows) == 5 and any("\u4e00" <= c <= "\u9fff" for c in chinese.rows[0]["Question"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = [{**ROW, "Question": f'{i}: "quoted", 发热\nsecond line'} for i in range(5)]
    if name.endswith(("jsonl", "json")):
        path = rows_file(tmp_path, rows, name)
    elif name.endswith("csv"):
        import csv

        path = tmp_path / name
        with open(path, "w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.DictWriter(stream, list(ROW))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path = tmp_path / name
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert loaded(path).rows == rows


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", range(10)), ("train[2:4]", range(2, 4)), ("train[:3]", range(3)), ("train[-2:]", range(8, 10)), ("train[10%:50%]", range(1, 5)), ("train[0:500]", range(10))],
)  # fmt: skip
def test_slices(tmp_path: Path, split: str, expected: range) -> None:
    path = rows_file(tmp_path, [{**ROW, "Question": str(i)} for i in range(10)])
    assert [row["Question"] for row in loaded(path, DATASET_SPLIT=split).rows] == [str(i) for i in expected]


def test_a_split_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"DATASET_SPLIT=test.*only the split train"):
        loaded(rows_file(tmp_path, [ROW]), DATASET_SPLIT="test")
    with pytest.raises(SettingsError, match="holds no rows"):
        loaded(rows_file(tmp_path, [ROW]), DATASET_SPLIT="train[5:9]")


BAD = {
    "null": {**ROW, "Response": None}, "an object, not text": {**ROW, "Response": {"a": 3}}, "list": {**ROW, "Response": ["a"]},
    "empty": {**ROW, "Response": ""}, "only white space": {**ROW, "Response": " \n\t\u3000"},
    "no column Response": {"Question": "a", "Complex_CoT": "b"}, "not an object": ["a"], r"column Question has half a character, \\ud800": {**ROW, "Question": "a\ud800b"},
}  # fmt: skip


@pytest.mark.parametrize("why", BAD)
def test_a_malformed_row_is_named_or_dropped(tmp_path: Path, why: str) -> None:
    path = rows_file(tmp_path, [ROW, BAD[why], ROW])
    with pytest.raises(SettingsError, match=rf"rows\.jsonl row 2 \(line 2\).*{why}[\s\S]*DROP_BAD_ROWS=1"):
        loaded(path)
    kept = loaded(path, DROP_BAD_ROWS=1)
    assert (kept.seen, kept.dropped, len(kept.rows)) == (3, 1, 2)


@pytest.mark.parametrize(
    ("row", "kind"), [(None, "null"), (1, "a number"), ("messages", "text"), (["messages"], "a list")]
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_first_row_that_is_no_object_is_a_malformed_row(tmp_path: Path, name: str, row: Any, kind: str) -> None:
    for whole in (ROW, {"messages": CHAT}):
        path = rows_file(tmp_path, [row, whole], name)
        with pytest.raises(SettingsError, match=rf"row 1.*: is {kind}, not an object[\s\S]*1 of 2 rows"):
            loaded(path)
        kept = loaded(path, DROP_BAD_ROWS=1)
        assert (
            kept.rows == [whole]
            and kept.dropped == 1
            and kept.format == ("messages" if "messages" in whole else "columns")
        )
    with pytest.raises(SettingsError, match=rf"all 2 rows are malformed; .* row 1.*: is {kind}, not an object"):
        loaded(rows_file(tmp_path, [row, row], name), DROP_BAD_ROWS=1)


def parquet_file(folder: Path, names: list[str], *columns: Any) -> Path:
    path = folder / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(column) for column in columns], names), path)
    return path


FAR = pyarrow.array([2**62], pyarrow.timestamp("us"))  # a time that Python's datetime cannot hold


def test_a_column_that_is_not_needed_may_hold_anything(tmp_path: Path) -> None:
    columns = [[text] for text in ROW.values()]
    assert loaded(parquet_file(tmp_path, [*ROW, "seen"], *columns, FAR)).rows == [ROW]
    assert loaded(parquet_file(tmp_path, ["seen", "messages"], FAR, [CHAT])).rows == [{"messages": CHAT}]
    with pytest.raises(
        SettingsError, match=r"row 1: has no column Response; its columns are seen, Question, Complex_CoT$"
    ):
        loaded(parquet_file(tmp_path, ["seen", "Question", "Complex_CoT"], FAR, *columns[:2]), DROP_BAD_ROWS=1)
    with pytest.raises(
        SettingsError, match=r"rows\.parquet: one of Question, .* cannot be read \(.*\); save it as text"
    ):
        loaded(parquet_file(tmp_path, list(ROW), FAR, *columns[1:]))


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    names = [*ROW, "Question"]
    path = parquet_file(tmp_path, names, *[["a"]] * 4)
    if name.endswith("csv"):
        path = tmp_path / name
        path.write_text(",".join(names) + "\na,a,a,a\n")
    with pytest.raises(SettingsError, match=rf"{name}: has more than one column Question; .* for example Question_2"):
        loaded(path)


def test_columns_without_a_name_may_be_many(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(",".join(ROW) + ",,\n" + ",".join(ROW.values()) + ",,\n")
    assert loaded(tmp_path / "rows.csv").rows == [ROW]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="all 1 rows are malformed"):
        loaded(rows_file(tmp_path, [BAD["null"]]), DROP_BAD_ROWS=1)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("rows.jsonl", b'{"Question": "a"\n', r"\(line 1\): is not JSON"), ("rows.json", b"{}", "holds no list"),
        ("rows.json", b'{"a": 1}\n{"a": 2}\n', "named .jsonl"), ("rows.jsonl", b"\xff\xfe", "UTF-8"), ("rows.jsonl", b"", "holds no rows"),
        ("rows.csv", b'a,b\n1,"2', "not CSV"), ("rows.csv", b"a,b\n1,2,3\n", "more fields"), ("rows.parquet", b"PAR1", "Parquet"),
        ("rows.jsonl", b"{}\n" + b"[" * 200_000, r"\(line 2\): is nested too deeply"), ("rows.json", b"[" * 200_000, r"rows\.json: nested too deeply"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=why):
        loaded(tmp_path / name)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        loaded(tmp_path / "absent.jsonl")
    (tmp_path / "rows.xls").write_text("")
    with pytest.raises(SettingsError, match="not a known kind"):
        loaded(tmp_path / "rows.xls")


def test_one_bos_one_eos_that_is_trained_on(tmp_path: Path, words: Any) -> None:
    literal = {
        **ROW,
        "Response": f"{words.bos_token or ''}It is this.{words.eos_token}",
        "Question": f"a{words.eos_token}b",
        "Complex_CoT": f"{words.eos_token[0]}{words.eos_token}{words.eos_token[1:]}Let me think.",
    }
    made = tokens(loaded(rows_file(tmp_path, [ROW, literal])), words).dataset
    for ids, labels in zip(made["input_ids"], made["labels"], strict=True):
        assert ids.count(words.eos_token_id) == 1 and ids[-1] == labels[-1] == words.eos_token_id
        assert labels == ids  # TRAIN_ON=all: the loss is on the whole text
        if words.bos_token_id is not None:
            assert ids.count(words.bos_token_id) == 1 and ids[0] == words.bos_token_id
    text = data.TEMPLATE.format(*ROW.values())
    assert words.decode(made[0]["input_ids"], skip_special_tokens=True) == text


def test_pad_is_not_eos(words: Any) -> None:
    assert words.pad_token_id is not None and words.pad_token_id != words.eos_token_id


def test_a_tokenizer_that_knows_no_places_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "ctrl"}')
    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a</w>": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    named = dict(tokenizer_class="CTRLTokenizer", eos_token="a</w>", unk_token="<unk>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(SettingsError, match=r"MODEL_NAME=base: its tokenizer \(CTRLTokenizer\) does not tell"):
        data.tokenizer(Source("base", None, tmp_path))


def test_a_pad_that_the_model_does_not_know_is_not_used(tmp_path: Path) -> None:
    """Fine-tuners add one to the tokenizer and forget the embedding; the first update with two rows read beyond its end."""
    made = tiny.tokenizer("llama")
    size = len(made)
    made.add_special_tokens({"pad_token": "<pad>"})
    made.save_pretrained(tmp_path)
    for config in ({"vocab_size": size}, {"text_config": {"vocab_size": size}}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        assert data.tokenizer(Source("base", None, tmp_path)).pad_token == "<|reserved_0|>"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": size + 1}))
    assert data.tokenizer(Source("base", None, tmp_path)).pad_token == "<pad>"


def test_the_response_alone(tmp_path: Path, words: Any) -> None:
    row = tokens(loaded(rows_file(tmp_path, [ROW])), words, TRAIN_ON="response").dataset[0]
    trained = [token for token in row["labels"] if token != data.IGNORE_INDEX]
    assert words.decode(trained) == f"\nLet me think.\n</think>\nIt is this.{words.eos_token}"


def test_white_space_of_the_response_is_trained_on_where_a_tokenizer_trims_offsets(tmp_path: Path) -> None:
    from tokenizers import processors

    made, rows = tiny.tokenizer("llama"), loaded(rows_file(tmp_path, [{**ROW, "Response": "def f():\n    return  発"}]))
    trimming = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    made.backend_tokenizer.post_processor = processors.Sequence([trimming, made.backend_tokenizer.post_processor])
    made.save_pretrained(tmp_path)
    words = data.tokenizer(Source("trimming", None, tmp_path))
    offsets = words("a  b", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert any(start == end for start, end in offsets)
    row = tokens(rows, words, TRAIN_ON="response").dataset[0]
    trained = [token for token in row["labels"] if token != data.IGNORE_INDEX]
    assert words.decode(trained) == "\nLet me think.\n</think>\ndef f():\n    return  発</s>"
    assert row["labels"][0] == data.IGNORE_INDEX and row["input_ids"][0] == words.bos_token_id


def test_overlong_rows_are_cut_counted_and_still_end(tmp_path: Path, words: Any) -> None:
    long = {**ROW, "Response": "It is this. " * 100}
    made = tokens(loaded(rows_file(tmp_path, [ROW, long])), words, MAX_SEQ_LENGTH=300)
    assert made.truncated == 1 and made.longest == 300
    assert made.dataset[1]["input_ids"][-1] == words.eos_token_id and len(made.dataset[1]["input_ids"]) == 300
    with pytest.raises(SettingsError, match="nothing left to train on"):
        tokens(loaded(rows_file(tmp_path, [ROW])), words, MAX_SEQ_LENGTH=20, TRAIN_ON="response")


def test_the_common_beginning_is_that_of_all_rows_and_their_labels(tmp_path: Path, words: Any) -> None:
    rows = loaded(rows_file(tmp_path, [ROW, {**ROW, "Question": "Why?"}, {**ROW, "Response": "No."}]))
    for trained in ("all", "response"):
        made = tokens(rows, words, TRAIN_ON=trained)
        pairs = [list(zip(row["input_ids"], row["labels"], strict=True)) for row in made.dataset]
        assert 0 < made.common < min(map(len, pairs))
        assert len({tuple(row[: made.common]) for row in pairs}) == 1
        assert len({tuple(row[: made.common + 1]) for row in pairs}) > 1
    assert tokens(loaded(rows_file(tmp_path, [ROW])), words).common == len(made.dataset[0]["input_ids"])


def test_the_order_of_rows_does_not_depend_on_processes(tmp_path: Path, words: Any) -> None:
    rows = loaded(
        rows_file(tmp_path, [{**ROW, "Question": f"number {i}"} for i in range(data.FEW_ROWS + 1)]), EVAL_ROWS=0
    )
    made = [tokens(rows, words, DATASET_NUM_PROC=n).dataset["input_ids"] for n in (1, 2, 4)]
    assert list(made[0]) == list(made[1]) == list(made[2]) and len(made[0]) > data.FEW_ROWS


def test_the_prompt_ends_where_the_answer_begins() -> None:
    prompt = data.template(settings()).prompt("Why?")
    assert prompt.endswith("### Question:\nWhy?\n### Response:\n<think>")
    assert data.TEMPLATE.format("Why?", "a", "b").startswith(prompt)


def test_a_template_of_ones_own(tmp_path: Path, words: Any) -> None:
    (tmp_path / "template.txt").write_text("Q: {}\nA: {}\n")
    path = rows_file(tmp_path, [{"q": "Why {}?", "a": "Because."}])
    own = dict(PROMPT_TEMPLATE=tmp_path / "template.txt", PROMPT_COLUMNS="q", COMPLETION_COLUMNS="a")
    row = tokens(loaded(path, **own), words, **own, TRAIN_ON="response").dataset[0]
    assert words.decode(row["input_ids"], skip_special_tokens=True) == "Q: Why {}?\nA: Because."
    assert words.decode([t for t in row["labels"] if t != data.IGNORE_INDEX], skip_special_tokens=True) == " Because."
    (tmp_path / "template.txt").write_text("Q: {}\nA: {}\n", encoding="utf-8-sig")  # as editors on Windows do
    assert tokens(loaded(path, **own), words, **own, TRAIN_ON="response").dataset[0] == row
    with pytest.raises(SettingsError, match=r"2 places \{\} for 3 columns"):
        data.template(settings(PROMPT_TEMPLATE=tmp_path / "template.txt"))
    with pytest.raises(SettingsError, match="cannot be read"):
        data.template(settings(PROMPT_TEMPLATE=tmp_path / "absent.txt"))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(SettingsError, match="is no file"):
        data.template(settings(PROMPT_TEMPLATE=tmp_path / "pipe.txt"))


CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Farewell."}]  # fmt: skip


def test_messages_go_through_the_chat_template(tmp_path: Path, words: Any) -> None:
    rows = loaded(rows_file(tmp_path, [{"messages": CHAT}]))
    assert rows.format == "messages"
    if not words.chat_template:
        with pytest.raises(SettingsError, match="no chat template"):
            tokens(rows, words)
        return
    row = tokens(rows, words).dataset[0]
    assert words.decode(row["input_ids"]) == str(words.apply_chat_template(CHAT, tokenize=False)).rstrip()
    assert row["labels"][-1] == row["input_ids"][-1] == words.eos_token_id
    only = tokens(rows, words, TRAIN_ON="response").dataset[0]
    assert words.decode([t for t in only["labels"] if t != data.IGNORE_INDEX]) == "Hi.<|im_end|>Farewell.<|im_end|>"


def test_a_template_that_asks_with_an_open_thought_has_answers_too(tmp_path: Path, words: Any) -> None:
    """DeepSeek-R1's: `<|Assistant|><think>` asks, and what is written of an answer is what follows its thought."""
    asks = copy.deepcopy(words)
    asks.chat_template = (
        "{% for m in messages %}{{ '\n' + m['role'] + ':' + m['content'].split('</think>')[-1] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nassistant:<think>\n' }}{% endif %}"
    )
    only = tokens(loaded(rows_file(tmp_path, [{"messages": CHAT}])), asks, TRAIN_ON="response").dataset[0]
    trained = asks.decode([t for t in only["labels"] if t != data.IGNORE_INDEX])
    assert trained == f"Hi.{asks.eos_token}Farewell.{asks.eos_token}"
    thinks = [*CHAT[:-1], {"role": "assistant", "content": "<think>\nHm.\n</think>Farewell."}]
    kept = tokens(loaded(rows_file(tmp_path, [{"messages": thinks}])), asks, TRAIN_ON="last").dataset[0]
    trained = asks.decode([t for t in kept["labels"] if t != data.IGNORE_INDEX])
    assert trained == f"<think>\nHm.\n</think>Farewell.{asks.eos_token}"


@pytest.mark.parametrize(
    ("messages", "why"),
    [([], "no list"), ("hello", "no list"), ([{"role": "user", "content": "a"}], "does not end with the assistant"), ([{"content": "a"}], "message 1 has no role"), ([{"role": "user", "content": None}], "content of message 1 is null"),
     ([{"role": "user", "content": "\ud800"}], "content of message 1 has half a character"), ([{**CHAT[-1], "name": "\ud800"}], "message 1 has half a character")],
)  # fmt: skip
def test_malformed_messages(tmp_path: Path, messages: Any, why: str) -> None:
    with pytest.raises(SettingsError, match=rf"row 1.*{why}"):
        loaded(rows_file(tmp_path, [{"messages": messages}]))
    assert loaded(rows_file(tmp_path, [{"messages": messages}, {"messages": CHAT}]), DROP_BAD_ROWS=1).dropped == 1


def test_what_stands_in_a_message_can_be_written_as_json(tmp_path: Path) -> None:
    chat = [{**CHAT[-1], "at": datetime.date(2024, 1, 1)}]
    with pytest.raises(SettingsError, match=r"row 1: message 1 cannot be written as JSON \(.*date"):
        loaded(parquet_file(tmp_path, ["messages"], [chat]))


def test_columns_of_a_hub_data_set_that_nobody_asked_for_are_not_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub
    import pyarrow

    never = pyarrow.array([2**62], pyarrow.timestamp("s"))  # beyond Python's years
    columns = {name: pyarrow.array([value]) for name, value in ROW.items()}
    found = datasets.Dataset(pyarrow.table({**columns, "seen": never}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: found)
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: True)
    read = data.load(settings(DATASET_NAME="owner/rows", DATASET_SPLIT="train"))
    assert read.rows == [ROW]
    with pytest.raises(SettingsError, match=r"no column No; its columns are .*seen"):
        data.load(
            settings(DATASET_NAME="owner/rows", DATASET_SPLIT="train", PROMPT_COLUMNS="No", COMPLETION_COLUMNS="Nor")
        )


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_name_that_an_object_has_twice_is_refused(tmp_path: Path, name: str) -> None:
    """Python keeps the last value, and the first was never trained."""
    row = '{"Question": "first", "Question": "second", "Complex_CoT": "a", "Response": "b"}'
    (tmp_path / name).write_text(row if name.endswith("l") else f"[{row}]")
    with pytest.raises(SettingsError, match="an object has Question more than once"):
        loaded(tmp_path / name)
