"""Where there is a tokenizer.json, its ids are the ids, under whatever class name and type of model; and what is saved gives them too."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

import real_tokenizers
import tiny
from finetune import data, files
from finetune.data import tokenizer_files
from finetune.data.formats.base import BadRow
from finetune.errors import SettingsError
from finetune.settings import Settings
from finetune.sources.model import Source

TYPES = ("llama", "qwen2", "qwen3", "mistral", "deepseek_v3", "falcon_h1")
CLASSES = ("LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "GemmaTokenizer", "GPT2Tokenizer", "NoSuchTokenizer", None)  # fmt: skip
TEXT = "Below is an instruction.\n### Question:\n一个患有急性阑尾炎的病人 has fever."


def folder_of(files: Path, place: Path, kind: str, **config: Any) -> Path:
    """A model's folder with a tokenizer's files under another class name. A name that is None is taken away."""
    place.mkdir(exist_ok=True)
    for file in files.iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, place / file.name)
    named = {**tokenizer_files.config_of(place), **config}
    (place / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in named.items() if v is not None}))
    (place / "config.json").write_text(json.dumps({"model_type": kind}))
    return place


def loaded(folder: Path) -> Any:
    return data.tokenizer(Source("base", None, folder))


def same_ids(tokenizer: Any, file: Path) -> None:
    """The tokenizer's ids, offsets and decoded texts are those of the file, on the fixed text and on the bundled rows."""
    own = Tokenizer.from_file(str(file))
    for text in (tokenizer_files.PROBE, TEXT, *tiny.texts()[:40]):
        wanted = own.encode(text, add_special_tokens=False)
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert found["input_ids"] == wanted.ids and [tuple(o) for o in found["offset_mapping"]] == wanted.offsets
        assert tokenizer.decode(wanted.ids) == own.decode(wanted.ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer as DeepSeek's: a class that is not its own, and a BOS that only tokenizer_config.json asks for."""
    place = tmp_path_factory.mktemp("byte-level")
    made = tiny.tokenizer("llama")
    made.backend_tokenizer.post_processor = None
    made.save_pretrained(place)
    return place


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_ids_are_the_files_under_every_class_and_type(
    tmp_path: Path, byte_level: Path, name: str | None, kind: str
) -> None:
    folder = folder_of(byte_level, tmp_path / "base", kind, tokenizer_class=name)
    same_ids(loaded(folder), folder / "tokenizer.json")
    words = data.rewritten(folder, [])
    saved = tmp_path / "any name"
    saved.mkdir()
    files.copy(folder, saved, ("tokenizer.json", "tokenizer_config.json"), words)
    same_ids(AutoTokenizer.from_pretrained(saved), saved / "tokenizer.json")
    # a merged folder has a config.json, and there transformers takes Qwen2Tokenizer for all of type qwen2: that is said
    shutil.copyfile(folder / "config.json", saved / "config.json")
    if kind == "qwen2":
        assert "Qwen2Tokenizer" in data.misread(saved, [])
    else:
        same_ids(AutoTokenizer.from_pretrained(saved), saved / "tokenizer.json")
        assert data.misread(saved, []) == ""


@pytest.mark.parametrize("name", real_tokenizers.SHA512)
def test_real_tokenizers(tmp_path: Path, name: str) -> None:
    files = real_tokenizers.folder(name)
    if files is None:
        pytest.skip("npm is not installed")
    own = tokenizer_files.config_of(files).get("tokenizer_class")
    for kind, given in [
        *((kind, own) for kind in TYPES),
        ("llama", "LlamaTokenizerFast"),
        ("qwen3", "LlamaTokenizerFast"),
    ]:
        config: dict[str, Any] = (
            {} if own else dict(bos_token="<s>", eos_token="</s>")
        )  # Llama 2's package has no configuration
        folder = folder_of(files, tmp_path / f"{kind}-{given}", kind, tokenizer_class=given, **config)
        words = loaded(folder)
        same_ids(words, folder / "tokenizer.json")
        guard = data.tokens.Guard.of(words)
        guard.compare(TEXT, decoded(words, TEXT), cut=False)
        shutil.rmtree(folder)


def test_deepseeks_chinese_is_trained_and_not_its_punctuation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers #45488, #46710: every space and every Chinese letter was lost."""
    files = real_tokenizers.folder("deepseek_v3")
    if files is None:
        pytest.skip("npm is not installed")
    folder = folder_of(files, tmp_path / "r1", "llama")
    words = loaded(folder)
    assert "LlamaTokenizer would change the text" in capsys.readouterr().out
    ids = words(TEXT)["input_ids"]  # those of transformers 4, where add_bos_token was obeyed
    assert ids == [words.bos_token_id, *Tokenizer.from_file(str(files / "tokenizer.json")).encode(TEXT).ids]
    assert words.decode(ids, skip_special_tokens=True) == TEXT


def test_a_bos_that_the_configuration_asks_for_is_there_and_saved(tmp_path: Path, byte_level: Path) -> None:
    folder = folder_of(byte_level, tmp_path / "base", "llama", tokenizer_class="LlamaTokenizerFast", add_bos_token=True)
    words = loaded(folder)
    bos = words.bos_token_id
    assert words("a")["input_ids"][0] == bos
    for name, content in data.rewritten(folder, []).items():
        (folder / name).write_bytes(content)
    again = AutoTokenizer.from_pretrained(folder)
    assert again("a")["input_ids"] == words("a")["input_ids"] and type(again).__name__ != "LlamaTokenizer"
    unasked = folder_of(
        byte_level, tmp_path / "other", "llama", tokenizer_class="LlamaTokenizerFast", add_bos_token=False
    )
    assert loaded(unasked)("a")["input_ids"][0] != bos


def test_files_that_do_not_mislead_are_copied_as_they_are(tmp_path: Path) -> None:
    tiny.tokenizer("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded(tmp_path)
    assert data.rewritten(tmp_path, []) == {}


def test_a_row_that_loses_something_on_its_way_ends_the_run(tmp_path: Path, byte_level: Path) -> None:
    """What is trained is held against what was given, whatever it was that lost it."""
    folder = folder_of(byte_level, tmp_path / "base", "llama", tokenizer_class="LlamaTokenizerFast")
    wrong = AutoTokenizer.from_pretrained(folder)  # as transformers reads it
    settings = Settings.from_env({"DATASET_NAME": "samples", "DATASET_CONFIG": "zh"})
    rows = data.load(settings)
    with pytest.raises(
        SettingsError,
        match=r"samples/zh.jsonl row 1 \(line 1\): would lose text in its tokens: 'Below is an .*' becomes 'Belowisan",
    ):
        data.tokenize(rows, wrong, settings)
    found = data.tokenize(rows, loaded(folder), settings)
    assert found.dropped == 0 and not found.notes


def decoded(words: Any, text: str) -> str:
    """What the tokens of a text say."""
    ids = words(text, add_special_tokens=False)["input_ids"]
    return str(words.backend_tokenizer.decode(ids, skip_special_tokens=False))


def test_the_guard_costs_less_than_a_second_on_500_rows(tmp_path: Path) -> None:
    tiny.tokenizer("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    words = loaded(tmp_path)
    guard = data.tokens.Guard.of(words)
    text = (data.TEMPLATE + TEXT * 8)[:3000]
    said, began = decoded(words, text), time.process_time()
    for _ in range(500):
        guard.compare(text, said, cut=False)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("question", "answer"), [("Strike out old price", "<p><s>$10</s> $5</p>"), ("Write <s>old</s>", "</s> ends it")]
)
def test_html_is_text(tmp_path: Path, question: str, answer: str) -> None:
    """<s> and </s> are BOS and EOS of Llama 2, and HTML."""
    tiny.tokenizer("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    words = loaded(tmp_path)
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"Question": question, "Complex_CoT": "Hm.", "Response": answer}) + "\n"
    )
    settings = Settings.from_env({"DATASET_NAME": str(tmp_path / "rows.jsonl")})
    found = data.tokenize(data.load(settings), words, settings)
    ids = found.dataset[0]["input_ids"]
    assert ids.count(words.bos_token_id) == ids.count(words.eos_token_id) == 1
    text = words.decode(ids[1:-1])
    assert question in text and answer in text
    assert any("hold the text of special tokens" in note for note in found.notes)


def test_a_column_of_nothing_but_eos_is_a_malformed_row(tmp_path: Path) -> None:
    tiny.tokenizer("qwen2").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    row = {"Question": "<|im_end|>", "Complex_CoT": "a", "Response": "<|im_end|>"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    settings = Settings.from_env({"DATASET_NAME": str(tmp_path / "rows.jsonl")})
    with pytest.raises(SettingsError, match=r"row 1 \(line 1\): column Response holds nothing but <\|im_end\|>"):
        data.tokenize(data.load(settings), loaded(tmp_path), settings)


@pytest.mark.parametrize("chat", [False, True])
def test_the_text_of_a_special_token_gets_no_spaces(tmp_path: Path, chat: bool) -> None:
    """Llama 2's tokenizer puts a space in front of each part, and so did parts that were encoded by themselves."""
    made = tiny.tokenizer("llama")
    made.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    made.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}"
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    words = loaded(tmp_path)
    answer = "<p><s>$10</s><s>$5</p>"
    row: dict[str, Any] = {"Question": "Why?", "Complex_CoT": "Hm.", "Response": answer}
    if chat:
        row = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    settings = Settings.from_env({"DATASET_NAME": str(tmp_path / "rows.jsonl")})
    ids = data.tokenize(data.load(settings), words, settings).dataset[0]["input_ids"]
    assert answer in words.decode(ids) and ids.count(words.bos_token_id) == 1


def test_sentencepieces_space_in_a_row_is_no_loss(tmp_path: Path) -> None:
    """Names of special tokens hold \u2581, and people write about them."""
    made = tiny.tokenizer("llama")
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    words = loaded(tmp_path)
    text = "What is <｜end▁of▁sentence｜>? A ▁ B"
    guard = data.tokens.Guard.of(words)
    assert guard.compare(text, decoded(words, text), cut=False)
    with pytest.raises(BadRow, match=r"'this is lost' becomes 'this is'"):  # not "Is" and "is", which is no loss
        guard.compare("This is lost", decoded(words, "This is"), cut=False)
