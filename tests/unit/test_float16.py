"""float16 on a GPU without bfloat16: gradients are scaled, and an update whose scaled gradients overflow is left out. On a CPU here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import Refusal
from short_run import fit


def scaled(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Runs train in float16, with gradients scaled by this much at first, as accelerate does it on a GPU."""
    from accelerate.state import AcceleratorState

    from finetune.training import trainer

    begin = trainer.OurTrainer.begin

    def begun(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        self.accelerator.native_amp, self.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")

    monkeypatch.setattr(trainer.OurTrainer, "begin", begun)


def test_an_update_whose_scaled_gradients_overflow_is_left_out(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled(monkeypatch, 2.0**22)
    found, adapter = fit(
        llama, tmp_path, MAX_STEPS="4", PER_DEVICE_TRAIN_BATCH_SIZE="1", GRADIENT_CHECKPOINTING="false"
    )
    norms = [row["grad_norm"] for row in found.metrics]
    left_out = norms.count(0.0)
    assert 0 < left_out < 4 and all(norms[left_out:])
    assert capsys.readouterr().out.count("left out") == left_out
    assert len({row["learning_rate"] for row in found.metrics[: left_out + 1]}) == 1  # its course waits, too
    assert all(bool(weight.isfinite().all()) for weight in adapter.values())


def test_gradients_that_overflow_unscaled_have_diverged(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.training import trainer

    real = trainer.OurTrainer.piece

    def piece(self: Any, model: Any, rows: Any, count: Any) -> Any:
        loss = real(self, model, rows, count)
        next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(trainer.OurTrainer, "piece", piece)
    scaled(monkeypatch, 4.0)
    with pytest.raises(Refusal, match=r"step 3: .* diverged"):
        fit(llama, tmp_path, MAX_STEPS="4", PER_DEVICE_TRAIN_BATCH_SIZE="1", GRADIENT_CHECKPOINTING="false")
