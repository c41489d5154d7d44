"""Which rows are held out, and which of them training knows already."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from finetune import data
from finetune.data import held_out, held_rows, held_tokens, near_duplicates
from finetune.data.formats.base import Text
from finetune.errors import SettingsError
from finetune.run import inputs
from finetune.settings import Settings


def settings(**values: Any) -> Settings:
    return Settings.from_env({}, {name: str(value) for name, value in values.items()})


@pytest.mark.parametrize(
    ("trained", "total", "values", "kept", "held"),
    [
        (range(500), 25_000, {}, range(500), range(500, 628)),  # twice as many as are wanted: some may be bad
        (range(500), 510, {}, range(500), range(500, 510)),
        (range(300, 500), 503, {}, range(300, 500), range(172, 300)),  # three after it are too few
        (range(1000), 1000, {}, range(950), range(950, 1000)),
        (range(10_000), 10_000, {}, range(9936), range(9936, 10_000)),
        (range(160), 160, {}, range(152), range(152, 160)),
        (range(159), 159, {}, range(159), []),  # 5 % of them are 7
        (range(32), 32, {}, range(32), []),
        (range(500), 25_000, {"EVAL_ROWS": 0}, range(500), []),
        (range(1000), 1000, {"EVAL_ROWS": 0}, range(1000), []),
        (range(500), 25_000, {"EVAL_ROWS": 9}, range(500), range(500, 518)),
        (range(100), 100, {"EVAL_ROWS": 10**6}, range(100), []),
        (range(1000), 1000, {"EVAL_ROWS": 10**6}, range(950), range(950, 1000)),
    ],
)
def test_rows_are_held_out_beside_the_trained_ones_or_at_their_end(
    trained: range, total: int, values: dict[str, Any], kept: range, held: Any
) -> None:
    found = held_out.choose(trained, total, settings(**values))
    assert found.trained == kept and found.held == list(held)
    assert not set(found.trained) & set(found.held)


def test_rows_that_are_trained_are_left_out_of_those_that_are_named() -> None:
    found = held_out.named(range(500), range(490, 510), settings())
    assert found.held == list(range(500, 510)) and found.strict and found.trained == range(500)
    assert not held_out.named(range(500), range(10, 20), settings()).held


def near(held: list[list[int]], trained: list[list[int]], common: int = 0, size: int = 3) -> list[bool]:
    blocks = (trained[start : start + size] for start in range(0, len(trained), size))
    flat = [
        (np.array(list(itertools.chain.from_iterable(b)), np.int32), np.array([*map(len, b)], np.int32)) for b in blocks
    ]
    return near_duplicates.near_duplicates(held, flat, common)


def plainly(held: list[list[int]], trained: list[list[int]], common: int) -> list[bool]:
    """The same rule in plain Python: whole rows, and sets of runs of eight tokens."""

    def grams(row: list[int]) -> set[tuple[int, ...]]:
        return {tuple(row[start : start + 8]) for start in range(common, len(row) - 7)}

    own = [grams(row) for row in held]
    often = {g for g in set().union(*own) if sum(g in each for each in own) > max(1, len(held) / 2)}
    found = []
    for index, row in enumerate(held):
        wanted = own[index] - often
        near = any(wanted and 2 * len(wanted & grams(other)) >= len(wanted) for other in trained)
        found.append(near or row in trained or row in held[:index])
    return found


@pytest.mark.parametrize("seed", range(20))
def test_near_duplicates_are_those_that_a_plain_search_finds(seed: int) -> None:
    draw = random.Random(seed)
    common = draw.choice([0, 3, 12])
    template, beginning = [draw.randrange(50) for _ in range(draw.choice([0, 10]))], [7] * common

    def row(tokens: int) -> list[int]:
        return [*beginning, *(draw.randrange(50) for _ in range(tokens)), *template]

    held = [row(draw.randrange(60)) for _ in range(draw.choice([1, 2, 9]))]
    trained = [row(draw.randrange(60)) for _ in range(draw.randrange(1, 12))]
    for mine in list(held):  # pieces of them, of every size, inside other rows
        part = mine[common : common + draw.randrange(len(mine) + 1)]
        at = draw.randrange(len(trained))
        trained[at] = draw.choice(
            [mine, [*trained[at], *part], [*trained[at][: common + 5], *part, *template], trained[at]]
        )
    held.append(held[0])
    assert near(held, trained, common) == plainly(held, trained, common)


def test_half_of_a_row_in_two_trained_rows_is_no_duplicate_and_order_and_blocks_do_not_matter() -> None:
    row = list(range(100, 200))
    quarters = [[*row[start : start + 30], *range(1000 + start, 1050 + start)] for start in (0, 30, 60)]
    whole = [[*range(40), *row[:70]]]
    assert near([row], quarters) == [False]
    for size in (1, 2, 5):
        assert near([row], [*quarters, *whole], size=size) == [True]
    assert near([[1, 2]], [[1, 2]]) == [True] and near([[1, 2]], [[1, 2, 3]]) == [
        False
    ]  # shorter than what is compared


def file(path: Path, numbers: range, **more: str) -> Path:
    """Rows of random words, the same for the same number."""

    def text(number: int, part: int) -> str:
        draw = random.Random(100 * number + part)
        return " ".join(f"word{draw.randrange(10**6)}" for _ in range(6))

    made = [dict(Question=text(i, 1), Complex_CoT=text(i, 2), Response=text(i, 3), **more) for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from finetune.sources.model import Source

    folder = tmp_path_factory.mktemp("words")
    tiny.tokenizer("llama").save_pretrained(folder)
    return data.tokenizer(Source("llama", None, folder))


def tokens(words: Any, **values: Any) -> data.Tokens:
    given = settings(**values)
    return data.tokenize(data.load(given), words, given)


def held(found: data.Tokens) -> held_out.HeldOut:
    assert found.held_out is not None
    return found.held_out


def test_the_last_rows_of_a_file_are_held_out_and_no_longer_trained(tmp_path: Path, words: Any) -> None:
    path = file(tmp_path / "rows.jsonl", range(200))
    found = tokens(words, DATASET_NAME=path)
    assert len(found.dataset) == 190 and len(held(found).rows) == 10 and not held(found).duplicates
    assert held(found).places[0].endswith("row 191 (line 191)") and "10 rows" in found.describe(0)
    all_rows = tokens(words, DATASET_NAME=path, EVAL_ROWS=0)
    assert len(all_rows.dataset) == 200 and all_rows.held_out is None
    assert found.dataset[:] == all_rows.dataset[:190]
    expected = [{name: all_rows.dataset[index][name] for name in ("input_ids", "labels")} for index in range(190, 200)]
    assert held(found).rows == expected
    question = held(found).questions[0]
    assert question.prompt.endswith("### Response:\n<think>") and len(held(found).questions) == 3
    assert question.reference.count("word") == 12


def test_a_row_is_asked_up_to_its_last_answer() -> None:
    conversation = Text("Q1 A1 Q2 A2 ", [(3, 5), (9, 12)])
    assert held_tokens.question(conversation) == held_out.Question("Q1 A1 Q2 ", "A2")
    assert held_tokens.question(Text("plain", [(0, 5)])) is None and held_tokens.question(Text("plain", [])) is None


def test_rows_beside_the_slice_leave_training_as_it_is_also_where_they_are_bad(tmp_path: Path, words: Any) -> None:
    path = file(tmp_path / "rows.jsonl", range(100))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:50], '{"Question": 5}', "[]", *lines[20:22], *lines[52:]]) + "\n")
    found = tokens(words, DATASET_NAME=path, DATASET_SPLIT="train[0:50]", EVAL_ROWS=20)
    without = tokens(words, DATASET_NAME=path, DATASET_SPLIT="train[0:50]", EVAL_ROWS=0)
    assert found.sha256 == without.sha256
    assert (len(held(found).rows), held(found).dropped, held(found).duplicates) == (20, 2, 2)
    with pytest.raises(SettingsError, match="row 51 "):  # named by the user, they are as strict as trained rows
        tokens(words, DATASET_NAME=path, DATASET_SPLIT="train[0:50]", EVAL_SPLIT="train[50:60]")
    kept = tokens(words, DATASET_NAME=path, DATASET_SPLIT="train[0:50]", EVAL_SPLIT="train[45:60]", DROP_BAD_ROWS=1)
    assert len(held(kept).rows) == 6 and kept.sha256 == found.sha256  # five are trained, two bad, two near-duplicates


def test_rows_that_are_all_trained_are_no_evaluation_and_a_sentence_says_so(tmp_path: Path, words: Any) -> None:
    path, same = file(tmp_path / "rows.jsonl", range(50)), file(tmp_path / "same.jsonl", range(20, 40))
    found = tokens(words, DATASET_NAME=path, EVAL_DATASET_NAME=same)
    assert not held(found).rows and held(found).duplicates == 20
    assert "no rows, 20 left out" in found.describe(0) and "EVAL_DATASET_NAME=" in found.describe(0)
    assert "too few" in tokens(words, DATASET_NAME=path).describe(0)
    with pytest.raises(SettingsError, match=r"EVAL_SPLIT=train.*names no rows beside"):
        tokens(words, DATASET_NAME=path, EVAL_SPLIT="train")


def test_rows_from_another_place_are_measured_and_all_others_trained(tmp_path: Path, words: Any) -> None:
    path, other = file(tmp_path / "rows.jsonl", range(200)), file(tmp_path / "other.jsonl", range(500, 530))
    found = tokens(words, DATASET_NAME=path, EVAL_DATASET_NAME=other, EVAL_ROWS=10)
    assert len(found.dataset) == 200 and len(held(found).rows) == 10 and held(found).name == str(other)
    some = tokens(words, DATASET_NAME=path, EVAL_DATASET_NAME=other, EVAL_SPLIT="train[25:]")
    assert [place.rpartition("(")[2] for place in held(some).places] == [f"line {line})" for line in range(26, 31)]
    again = tokens(words, DATASET_NAME=path, EVAL_DATASET_NAME=other, EVAL_ROWS=10**9)
    assert len(held(again).rows) == 30


@pytest.mark.parametrize(
    ("content", "values", "said"),
    [
        (None, {}, "no such file"), ("{", {}, "not JSON"), ("[]\n", {}, "not an object"), ('{"Question": 1}\n', {}, "row 1"), ("", {}, "holds no rows"),
        ("{}", {"EVAL_SPLIT": "test"}, "EVAL_SPLIT=test: a file or folder has only the split train"),
    ],
)  # fmt: skip
def test_a_wrong_file_of_held_out_rows_is_named_by_its_own_setting(
    tmp_path: Path, content: str | None, values: dict[str, str], said: str
) -> None:
    path, other = file(tmp_path / "rows.jsonl", range(20)), tmp_path / "other.jsonl"
    if content is not None:
        other.write_text(content)
    given = settings(DATASET_NAME=path, EVAL_DATASET_NAME=other, **values)
    with pytest.raises(SettingsError) as caught:
        data.load(given)
    text = str(caught.value)
    assert said in text and str(other) in text + str(values and other) and " DATASET_NAME=" not in f" {text}"
    if content is None:
        assert any(problem.startswith("EVAL_DATASET_NAME=") for problem in held_rows.missing(given))
        assert not list(held_rows.missing(given.replaced(eval_rows=0)))


@pytest.mark.parametrize("values", [{}, {"EVAL_ROWS": 0}, {"EVAL_SPLIT": "test"}, {"EVAL_DATASET_NAME": "x.jsonl"}])
def test_what_will_be_held_out_is_said_before_anything_is_read(values: dict[str, Any]) -> None:
    assert held_out.expected(settings(**values)).startswith("held out: ")


@pytest.mark.parametrize("name", ["LOAD_BEST_MODEL_AT_END", "EARLY_STOPPING_PATIENCE"])
def test_what_needs_measurements_says_so(name: str) -> None:
    for values in ({}, {"EVAL_STEPS": 2, "EVAL_ROWS": 0}):
        with pytest.raises(SettingsError, match=f"{name}=1: needs measurements"):
            settings(**{name: 1}, **values)
    settings(**{name: 1}, EVAL_STEPS=2)


def test_a_threshold_without_patience_would_have_no_effect() -> None:
    with pytest.raises(SettingsError, match=r"EARLY_STOPPING_THRESHOLD=0\.1: counts only with EARLY_STOPPING_PATIENCE"):
        settings(EARLY_STOPPING_THRESHOLD="0.1")
    settings(EARLY_STOPPING_THRESHOLD="0.1", EARLY_STOPPING_PATIENCE=3, EVAL_STEPS=20)


def test_the_hub_is_asked_for_held_out_rows_too(tmp_path: Path) -> None:
    here = dict(MODEL_NAME=str(tmp_path), DATASET_NAME="samples", DATASET_CONFIG="en")
    assert not inputs.from_hub(settings(**here)) and not inputs.from_hub(settings(**here, EVAL_DATASET_NAME="a.jsonl"))
    assert inputs.from_hub(settings(**here, EVAL_DATASET_NAME="owner/rows"))
    assert not inputs.from_hub(settings(**here, EVAL_DATASET_NAME="owner/rows", EVAL_ROWS=0))
