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

    from finetune.training import batches, trainer

    begin = trainer.UpdateTrainer.__init__

    def begun(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        self.accelerator.native_amp, self.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")

    monkeypatch.setattr(trainer.UpdateTrainer, "__init__", begun)
    monkeypatch.setattr(batches.Padded, "_autocast", lambda self: torch.autocast("cpu", torch.float16))


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
    from finetune.training import update

    real = update.Updates.piece

    def piece(self: Any, rows: Any, count: Any, backward: Any) -> Any:
        loss = real(self, rows, count, backward)
        next(p for p in self.model.parameters() if p.requires_grad).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(update.Updates, "piece", piece)
    scaled(monkeypatch, 4.0)
    with pytest.raises(Refusal, match=r"step 3: .* diverged"):
        fit(llama, tmp_path, MAX_STEPS="4", PER_DEVICE_TRAIN_BATCH_SIZE="1", GRADIENT_CHECKPOINTING="false")
