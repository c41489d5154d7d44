"""What is measured before a plan is made: pieces as an update may have them, and the same first whether a plan is made or followed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.engines import plain as engine
from finetune.engines.compiled.path import MicroBatches
from finetune.settings import Settings
from finetune.training import plan, probe
from finetune.training import planner as planning


class Trainer:
    """Notes the rows of each pass. `longest`: of the rows; `shared`: what they begin with."""

    pads = False

    def __init__(self, longest: int, shared: int, places: int):
        self.packed = MicroBatches(None, places, longest, "cpu", shared) if places else None
        self.train_dataset = self
        self.passes: list[tuple[list[list[int]], int]] = []
        self.row = list(range(longest))

    def select(self, which: range) -> dict[str, list[list[int]]]:
        return dict(input_ids=[self.row])

    def recompute(self, count: int) -> None:
        self.recomputed = count

    def loss_of(self, model: Any, rows: list[dict[str, list[int]]], count: Any) -> torch.Tensor:
        self.passes.append(([row["input_ids"] for row in rows], int(count)))
        if self.packed:
            assert self.packed.pack(rows)["input_ids"].numel() == int(count)
        return torch.zeros((), requires_grad=True)

    def forget(self, model: Any) -> None:
        self.forgot = True


def planner(longest: int, shared: int, places: int, limit: float | None = 8.0 * plan.GIB) -> planning.Planner:
    model: Any = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=64))
    model.device = torch.device("cpu")
    trainer: Any = Trainer(longest, shared, places)
    tokens: Any = SimpleNamespace(longest=longest, dataset=[0])
    settings = Settings.from_env({"PER_DEVICE_TRAIN_BATCH_SIZE": str(places or 8), "GRADIENT_ACCUMULATION_STEPS": "1"})
    return planning.Planner(trainer, model, settings, tokens, engine, limit)


@pytest.mark.parametrize(
    ("longest", "shared", "places"),
    [(2048, 82, 8), (550, 499, 8), (200, 179, 8), (200, 82, 2), (100, 99, 8), (1100, 599, 8), (1500, 1199, 8), (3000, 0, 8), (90, 0, 4)],
)  # fmt: skip
def test_passes_are_pieces_that_an_update_may_have(
    longest: int, shared: int, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planner(longest, shared, places)

    def measure(
        model: Any, layers: int, width: int, optimizer: float, sizes: tuple[int, int], run: Any, **_: Any
    ) -> Any:
        assert 0 < sizes[0] - shared < sizes[1] - shared <= planning.MOST_TOKENS
        for size in sizes:
            run(size, 3)

    monkeypatch.setattr(probe, "measure", measure)
    monkeypatch.setattr(engine, "layers", lambda model: 4)
    made._measured()
    trainer: Any = made.trainer
    assert len(trainer.passes) == 2 and trainer.forgot and trainer.recomputed == 3
    for rows, count in trainer.passes:
        assert 0 < len(rows) <= places and max(map(len, rows)) <= longest
        assert sum(map(len, rows)) - (len(rows) - 1) * shared == count
        assert len({tuple(row[:shared]) for row in rows}) == 1


@pytest.mark.parametrize("longest", [2048, 700, 90])
@pytest.mark.parametrize("set_rows", [None, 1])
def test_rows_that_are_filled_up_are_measured_with_a_mask(longest: int, set_rows: int | None) -> None:
    made = planner(longest, 0, places=0)
    if set_rows:
        values = {"PER_DEVICE_TRAIN_BATCH_SIZE": "1", "GRADIENT_ACCUMULATION_STEPS": "8"}
        made = dataclasses.replace(made, settings=Settings.from_env(values))
    trainer: Any = made.trainer
    trainer.pads = True
    stream, sizes = made._stream()
    for size in sizes:
        made._loss(stream[:size], 0)
        lengths = [len(row) for row in trainer.passes[-1][0]]
        assert max(lengths) <= longest
        if set_rows:
            assert sum(lengths) == size
        else:
            assert len(set(lengths)) > 1
            assert size <= len(lengths) * max(lengths) < size + len(lengths)  # as a plan counts them


def test_a_followed_plan_is_compiled_for_the_same_sizes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = plan.Plan(8, 1, 0, 4, "recorded")
    monkeypatch.setattr(MicroBatches, "place_embedding", lambda self, on_host: None)
    monkeypatch.setattr(MicroBatches, "dequantize", lambda self, on: on)
    monkeypatch.setattr(MicroBatches, "dequantized_bytes", lambda self: 0)
    monkeypatch.setattr(MicroBatches, "movable", lambda self: 0)
    monkeypatch.setattr(planning.Planner, "_chosen", lambda self, cost: recorded)
    monkeypatch.setattr(engine, "layers", lambda model: 4)
    monkeypatch.setattr(probe, "_pass", lambda run, tokens, recomputed: probe.Pass(1, 1, 1, 1.0))
    monkeypatch.setattr(probe, "speed", lambda size: 1.0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    chosen, followed = planner(2048, 82, 8), planner(2048, 82, 8)
    assert chosen.choose() == followed.follow(recorded) == recorded
    first: list[Any] = [made.trainer.passes[0] for made in (chosen, followed)]  # type: ignore[attr-defined]
    assert first[0] == first[1] and first[0][1] == 82 + planning.MOST_TOKENS // 2


def test_a_plan_of_another_machine_is_followed_as_far_as_that_can_be() -> None:
    recorded = plan.Plan(8, 1, 0, 4, "recorded", embedding_on_host=True, dequantized=True)
    found = planner(2048, 0, places=0, limit=None).follow(recorded)
    assert (found.micro_batch, found.embedding_on_host, found.dequantized) == (8, False, False)
