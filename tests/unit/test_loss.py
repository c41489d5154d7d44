"""The loss of an update is the mean over its labels, of the model's own logits, whatever the model and the pieces."""

from __future__ import annotations

from pathlib import Path

import pytest

from short_run import fit

PIECES = dict(PER_DEVICE_TRAIN_BATCH_SIZE="1", GRADIENT_ACCUMULATION_STEPS="4")


def test_pieces_are_averaged_also_where_the_model_would_not_take_their_count(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3n and 4 say so of themselves; without the count each piece's loss is a mean of its own, and their sum four times as large."""
    from transformers import LlamaForCausalLM

    expected, _ = fit(llama, tmp_path / "counted", MAX_STEPS="1")
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    found, _ = fit(llama, tmp_path / "not-counted", MAX_STEPS="1", **PIECES)
    for name in ("loss", "grad_norm"):
        assert found.metrics[0][name] == pytest.approx(expected.metrics[0][name], rel=1e-4)
