"""Which rows are held out, and which of them training knows already."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from finetune.data import held_out, near_duplicates
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
    flat = [(np.array(list(itertools.chain.from_iterable(b)), np.int32), np.array([*map(len, b)], np.int32)) for b in blocks]
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
        trained[at] = draw.choice([mine, [*trained[at], *part], [*trained[at][: common + 5], *part, *template], trained[at]])
    held.append(held[0])
    assert near(held, trained, common) == plainly(held, trained, common)


def test_half_of_a_row_in_two_trained_rows_is_no_duplicate_and_order_and_blocks_do_not_matter() -> None:
    row = list(range(100, 200))
    quarters = [[*row[start : start + 30], *range(1000 + start, 1050 + start)] for start in (0, 30, 60)]
    whole = [[*range(40), *row[:70]]]
    assert near([row], quarters) == [False]
    for size in (1, 2, 5):
        assert near([row], [*quarters, *whole], size=size) == [True]
    assert near([[1, 2]], [[1, 2]]) == [True] and near([[1, 2]], [[1, 2, 3]]) == [False]  # shorter than what is compared


def test_a_table_gives_its_rows_in_blocks_also_after_some_were_left_out() -> None:
    from datasets import Dataset

    table = Dataset.from_list([dict(input_ids=list(range(index))) for index in range(10)]).select([1, 3, 9])
    parts = [(ids.tolist(), lengths.tolist()) for ids, lengths in near_duplicates.blocks(table, 2)]
    assert parts == [([0, 0, 1, 2], [1, 3]), (list(range(9)), [9])]
