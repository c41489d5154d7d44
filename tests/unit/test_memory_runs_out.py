"""An update that does not fit the memory is begun anew in smaller pieces: nothing is lost, and nothing counts twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import Refusal
from finetune.training import order, plan, update
from short_run import fit


def out_of_memory_once(monkeypatch: pytest.MonkeyPatch, larger_than: int, after: int) -> None:
    """From the piece number `after` on, a piece of more rows than `larger_than` fails when its gradients are made already."""
    real, seen = update.Updates.piece, [0]

    def piece(self: Any, rows: Any, count: Any, backward: Any) -> Any:
        seen[0] += 1
        loss = real(self, rows, count, backward)
        if seen[0] > after and len(rows) > larger_than:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return loss

    monkeypatch.setattr(update.Updates, "piece", piece)


def test_the_update_is_repeated_in_half_the_pieces(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, by_fours = fit(llama, tmp_path / "whole")
    out_of_memory_once(monkeypatch, larger_than=1, after=1)
    found, adapter = fit(llama, tmp_path / "halved")
    assert "update 2 is repeated as 2 x 2" in (said := capsys.readouterr().out) and "repeated as 1 x 4" in said
    assert (found.plan.micro_batch, found.plan.accumulation, found.plan.forecast_gib) == (1, 4, None)
    assert [row["loss"] for row in found.metrics] == pytest.approx([row["loss"] for row in expected.metrics], rel=1e-5)
    assert [row["tokens"] for row in found.metrics] == [row["tokens"] for row in expected.metrics]
    assert all(torch.allclose(adapter[name], by_fours[name], rtol=1e-3, atol=1e-5) for name in by_fours)


def test_halved_pieces_are_counted_as_they_are(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.training import planner as planning

    monkeypatch.setattr(planning.Planner, "choose", lambda self: plan.Plan(3, 2, 0, 2, "3 + 1 rows"))
    out_of_memory_once(monkeypatch, larger_than=1, after=0)
    found, _ = fit(llama, tmp_path)
    assert (found.plan.micro_batch, found.plan.accumulation) == (1, 4)


def test_the_activations_are_recomputed_before_one_row_is_given_up(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, _ = fit(llama, tmp_path / "whole")
    real = update.Updates.piece

    def piece(self: Any, rows: Any, count: Any, backward: Any) -> Any:
        if len(rows) > 1 or self.plan.recomputed < self.plan.layers:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(self, rows, count, backward)

    monkeypatch.setattr(update.Updates, "piece", piece)
    begin = update.Updates.__init__
    monkeypatch.setattr(update.Updates, "__init__", lambda *args, **may: begin(*args, may_recompute=True))
    found, _ = fit(llama, tmp_path / "recomputed", GRADIENT_CHECKPOINTING="false")
    assert "with the activations of all layers recomputed" in capsys.readouterr().out
    assert (found.plan.micro_batch, found.plan.checkpointing) == (1, "full")
    assert [row["loss"] for row in found.metrics] == pytest.approx([row["loss"] for row in expected.metrics], rel=1e-5)


def test_one_row_that_does_not_fit_is_said_with_the_way_out(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_once(monkeypatch, larger_than=0, after=0)
    with pytest.raises(Refusal, match=r"one row at a time.*MAX_SEQ_LENGTH=144"):
        fit(llama, tmp_path / "none")


def test_the_rows_to_come_are_known_beforehand_and_stay_the_same(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan looks at the lengths in their order, over more than one pass; looking must not change it."""
    undisturbed, _ = fit(llama, tmp_path / "undisturbed", MAX_STEPS="6")
    foreseen: list[list[int]] = []
    seen: list[list[int]] = []
    of, real = order.Order.of, update.Updates.piece

    def looking(*args: Any) -> Any:
        made = of(*args)
        foreseen.extend(made.tokens(6))
        return made

    def piece(self: Any, rows: Any, count: Any, backward: Any) -> Any:
        seen.append([len(row["input_ids"]) for row in rows])
        return real(self, rows, count, backward)

    monkeypatch.setattr(order.Order, "of", looking)
    monkeypatch.setattr(update.Updates, "piece", piece)
    found, _ = fit(llama, tmp_path / "looked", MAX_STEPS="6")
    assert foreseen == seen and len(seen) == 6  # 16 rows, four an update: the second pass begins with the fifth
    assert [row["loss"] for row in found.metrics] == [row["loss"] for row in undisturbed.metrics]
