"""What is measured before a plan is made: pieces as an update may have them, and the same first whether a plan is made or followed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.settings import Settings
from finetune.training import plan, probe
from finetune.training.order import Order
from finetune.training.planner import MOST_TOKENS, Planner

ENGINE: Any = SimpleNamespace(layers=lambda model: 4, KEEPS_INPUTS=True, PARTIAL=True)


class Noted:
    """Micro-batches that compute nothing, and note the rows of each pass and where things are placed."""

    def __init__(self, shared: int, pads: bool):
        self.shared, self.pads = shared, pads
        self.passes: list[tuple[list[list[int]], int]] = []
        self.placed: list[tuple[str, bool]] = []

    def loss(self, rows: Any, count: torch.Tensor) -> torch.Tensor:
        self.passes.append(([row["input_ids"] for row in rows], int(count)))
        return torch.zeros((), requires_grad=True)

    def movable(self) -> int:
        return 0

    def place_embedding(self, on_host: bool) -> None:
        self.placed.append(("on host", on_host))

    def dequantized_bytes(self) -> int:
        return 0

    def dequantize(self, on: bool) -> bool:
        self.placed.append(("dequantized", on))
        return on and not self.pads


def planner(
    longest: int, shared: int, rows: int, *, pads: bool = False, limit: float | None = 8.0 * plan.GIB, **values: str
) -> tuple[Planner, Noted]:
    """A planner for rows of one length, and what it asks. rows: of an update."""
    model: Any = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=64))
    model.device = torch.device("cpu")
    noted = Noted(shared, pads)
    set_to = {"PER_DEVICE_TRAIN_BATCH_SIZE": str(rows), "GRADIENT_ACCUMULATION_STEPS": "1", **values}
    order = Order([longest] * rows, rows, 3, 0)
    made = Planner(
        model, noted, ENGINE, lambda count: None, Settings.from_env(set_to), order, list(range(longest)), longest, limit
    )
    return made, noted


def measure(
    model: Any, layers: int, width: int, optimizer: float, sizes: tuple[int, int], run: Any, **_: Any
) -> plan.Cost:
    """The passes that `probe.measure` makes first, without their memory."""
    for size in sizes:
        run(size, 3)
    nothing: Any = dict.fromkeys(("outside", "kept_recomputed", "work", "work_token", "loss", "loss_token"), 0)
    return plan.Cost(layers=layers, fixed=plan.GIB, kept=1, **nothing)


@pytest.mark.parametrize(
    ("longest", "shared", "rows"),
    [(2048, 82, 8), (550, 499, 8), (200, 179, 8), (200, 82, 2), (100, 99, 8), (1100, 599, 8), (1500, 1199, 8), (3000, 0, 8), (90, 0, 4)],
)  # fmt: skip
def test_passes_are_pieces_that_an_update_may_have(
    longest: int, shared: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "measure", measure)
    made, noted = planner(longest, shared, rows)
    made.choose()
    sizes = [count for _, count in noted.passes]
    assert len(sizes) == 2 and 0 < sizes[0] - shared < sizes[1] - shared <= MOST_TOKENS
    for some, count in noted.passes:
        assert 0 < len(some) <= rows and max(map(len, some)) <= longest
        assert sum(map(len, some)) - (len(some) - 1) * shared == count
        assert len({tuple(row[:shared]) for row in some}) == 1


@pytest.mark.parametrize("longest", [2048, 700, 90])
@pytest.mark.parametrize("set_rows", [None, 1])
def test_rows_that_are_filled_up_are_measured_with_a_mask(
    longest: int, set_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "measure", measure)
    values = {"PER_DEVICE_TRAIN_BATCH_SIZE": "1", "GRADIENT_ACCUMULATION_STEPS": "8"} if set_rows else {}
    made, noted = planner(longest, 0, 8, pads=True, **values)
    made.choose()
    for some, size in noted.passes:
        lengths = [len(row) for row in some]
        assert max(lengths) <= longest
        if set_rows:
            assert sum(lengths) == size
        else:
            assert len(set(lengths)) > 1
            assert size <= len(lengths) * max(lengths) < size + len(lengths)  # as a plan counts them


def test_a_followed_plan_is_compiled_for_the_same_sizes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "measure", measure)
    (one, chosen), (other, followed) = planner(2048, 82, 8), planner(2048, 82, 8)
    made = one.choose()
    assert other.follow(made) == made
    assert chosen.passes[0] == followed.passes[0] and chosen.passes[0][1] == 82 + MOST_TOKENS // 2
    assert followed.placed == chosen.placed


def test_a_plan_of_another_machine_is_followed_as_far_as_that_can_be() -> None:
    recorded = plan.Plan(8, 1, 0, 4, "recorded", embedding_on_host=True, dequantized=True)
    made, noted = planner(2048, 0, 8, pads=True, limit=None)
    found = made.follow(recorded)
    assert (found.micro_batch, found.embedding_on_host, found.dequantized) == (8, False, False)
    assert not noted.passes
