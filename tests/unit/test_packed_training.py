"""The packed path under the real trainer, on a CPU: the same course as without it, recomputing and dropout as set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from finetune.engines import plain as engine
from finetune.engines.choose import Choice
from finetune.engines.compiled import attention
from finetune.engines.compiled import path as compiled
from finetune.training import fit as train
from short_run import fit


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs take the packed path; the list gets an entry for each call of the attention."""
    calls: list[int] = []

    def attend(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return tiny.varlen_attention(*args, **options)

    @contextlib.contextmanager
    def path(model: Any, chosen: bool, max_rows: int, longest: int, shared: int) -> Iterator[Any]:
        if not chosen:
            yield None
            return
        with compiled.applied(model, max_rows, longest, "cpu", shared) as packed:
            yield packed

    monkeypatch.setattr(attention, "varlen_attn", attend)
    monkeypatch.setattr(engine, "path", path)
    return calls


def losses(llama: Path, output: Path, packed: bool = True, **values: str) -> list[float]:
    """Of three updates of four rows, two in each piece."""
    choice = Choice("transformers", "a test", compiled=packed, deterministic=True)
    pieces = dict(PER_DEVICE_TRAIN_BATCH_SIZE="2", GRADIENT_ACCUMULATION_STEPS="2", GRADIENT_CHECKPOINTING="false")
    return [row["loss"] for row in fit(llama, output, choice, **pieces | values)[0].metrics]


def test_the_course_is_that_of_the_unpacked_path(llama: Path, tmp_path: Path, attended: list[int]) -> None:
    expected = losses(llama, tmp_path / "padded", packed=False)
    assert not attended
    assert losses(llama, tmp_path / "packed") == pytest.approx(expected, rel=1e-4)


def test_layers_are_recomputed_where_that_is_set(llama: Path, tmp_path: Path, attended: list[int]) -> None:
    kept = losses(llama, tmp_path / "kept")
    once = len(attended)
    assert losses(llama, tmp_path / "recomputed", GRADIENT_CHECKPOINTING="true") == kept
    assert len(attended) - once == 2 * once


def test_dropout_is_active_in_every_update(llama: Path, tmp_path: Path, attended: list[int]) -> None:
    without, dropped = losses(llama, tmp_path / "0"), losses(llama, tmp_path / "0.5", LORA_DROPOUT="0.5")
    assert dropped[0] == pytest.approx(without[0], rel=1e-6)  # B is zero in the first update
    assert all(abs(a - b) / b > 1e-4 for a, b in zip(dropped[1:], without[1:], strict=True))


def test_nothing_moves_the_model_while_it_is_trained(
    llama: Path, tmp_path: Path, attended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate would move it to the GPU as a whole, and with it the embedding that waits on the host."""
    from peft import PeftModel

    from finetune.training import trainer

    moved: list[Any] = []
    begin = trainer.UpdateTrainer.__init__

    def watched(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        monkeypatch.setattr(PeftModel, "to", lambda self, *where, **options: moved.append(where) or self)

    monkeypatch.setattr(trainer.UpdateTrainer, "__init__", watched)
    losses(llama, tmp_path)
    assert not moved


def test_a_card_with_no_room_to_measure_gives_it_the_embedding_s(
    llama: Path,
    tmp_path: Path,
    attended: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from finetune.training import plan, probe

    places: list[bool] = []
    place = compiled.Packed.place_embedding

    def placed(self: Any, on_host: bool) -> None:
        places.append(on_host)
        place(self, on_host)

    def measure(*args: Any, **options: Any) -> plan.Cost:
        if not places:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plan.Cost(
            layers=2, fixed=plan.GIB, outside=0, kept=1, kept_recomputed=1, work=0, work_token=0, loss=0, loss_token=0
        )

    monkeypatch.setattr(compiled.Packed, "place_embedding", placed)
    monkeypatch.setattr(probe, "measure", measure)
    for limit, on_host in ((8.0, False), (1.1, True)):
        places.clear()
        monkeypatch.setattr(train, "limit", lambda settings, limit=limit: limit * plan.GIB)
        losses(llama, tmp_path / str(limit))
        assert places == [True, on_host] and ("on the host" in capsys.readouterr().out) == on_host


def test_weights_are_dequantized_where_whole_updates_fit_beside_them(
    llama: Path, tmp_path: Path, attended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.training import plan, probe, update

    dequantized: list[bool] = []
    seen: list[int] = []
    real = update.Updates.piece

    def dequantize(self: Any, on: bool) -> bool:
        dequantized.append(on)
        return on

    def course(name: str, wide: int, kept: float) -> tuple[list[bool], train.Fit]:
        """How weights of `wide` bytes were placed on a card of 8 GiB, where a token and layer takes `kept` bytes."""
        nothing: Any = dict.fromkeys(("outside", "kept_recomputed", "work", "work_token", "loss", "loss_token"), 0)
        cost = plan.Cost(layers=2, fixed=plan.GIB, kept=kept, **nothing)
        monkeypatch.setattr(compiled.Packed, "dequantized_bytes", lambda self: wide)
        monkeypatch.setattr(probe, "measure", lambda *args, **options: cost)
        dequantized.clear()
        choice = Choice("transformers", "a test", compiled=True, deterministic=True)
        return dequantized, fit(llama, tmp_path / name, choice)[0]

    def piece(self: Any, *args: Any) -> Any:
        seen.append(1)
        if self.plan.dequantized and len(seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(self, *args)

    monkeypatch.setattr(train, "limit", lambda settings: 8.0 * plan.GIB)
    monkeypatch.setattr(compiled.Packed, "dequantize", dequantize)
    assert course("fits", plan.GIB, 1)[0] == [True, False, True]  # measured, and then placed as planned
    assert course("must-recompute", plan.GIB, 1e9)[0] == [True, False, False]
    assert course("too-large", 3 * plan.GIB, 1)[0] == [False]
    assert course("16-bits", 0, 1)[0] == [False]
    monkeypatch.setattr(update.Updates, "piece", piece)
    found, done = course("runs-out", plan.GIB, 1)
    assert found == [True, False, True, False]
    assert (done.plan.dequantized, done.plan.micro_batch, len(done.metrics)) == (False, 4, 3)
