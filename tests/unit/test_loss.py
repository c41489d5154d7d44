"""The loss of an update is the mean over its labels, of the model's own logits, whatever the model and the pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
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


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("granite", dict(logits_scaling=1.0)), ("granite", dict(logits_scaling=0.01)), ("granite", dict(logits_scaling=8.0)),
        ("granitemoehybrid", dict(logits_scaling=6.0)), ("falcon_h1", dict(lm_head_multiplier=0.04)),
        ("gemma2", dict(final_logit_softcapping=0.1)), ("llama4_text", {}), ("mpt", dict(max_seq_len=288, logit_scale=0.5)),
    ],
)  # fmt: skip
def test_what_a_model_does_to_its_logits_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, changes: dict[str, float]
) -> None:
    """Granite divides them, which trl's loss in chunks leaves out: a hundred times larger they are far from even.

    Made smaller, a random model's loss changes by some thousandths alone.
    """
    from transformers import AutoModelForCausalLM

    from finetune.training import update

    rows: list[dict[str, list[int]]] = []
    real = update.Updates.piece

    def piece(self: Any, some: Any, count: Any, backward: Any) -> Any:
        rows.extend(some)
        return real(self, some, count, backward)

    monkeypatch.setattr(update.Updates, "piece", piece)
    folder = tiny.model(tmp_path / "base", kind, **changes)
    named = dict(TARGET_MODULES="Wqkv" if kind == "mpt" else "q_proj,v_proj")
    found, _ = fit(folder, tmp_path / "run", MAX_STEPS="1", **named, **PIECES)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = [torch.tensor([row["input_ids"]]) for row in rows]
    with torch.no_grad():
        losses = [
            float(torch.nn.functional.cross_entropy(own(input_ids=each).logits[0, :-1], each[0, 1:], reduction="sum"))
            for each in ids
        ]
    assert found.metrics[0]["loss"] == pytest.approx(sum(losses) / sum(each.numel() - 1 for each in ids), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_the_head_alone_takes_the_loss_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Which needs no logits of whole rows; Granite's take them where their scaling is not 1."""
    from finetune.training import batches

    asked: list[bool] = []
    real = batches.Padded._head_is_all
    monkeypatch.setattr(batches.Padded, "_head_is_all", lambda self, ids: asked.append(real(self, ids)) or asked[-1])
    fit(
        tiny.model(tmp_path / "base", kind, **dict(logits_scaling=1.01) if kind == "granite" else {}),
        tmp_path / "run",
        MAX_STEPS="1",
    )
    assert asked == [kind == "llama"]


def test_recomputed_layers_drop_what_they_dropped_before(tmp_path: Path) -> None:
    """Of the attention, too, whose dropout is no module but a number."""
    llama = tiny.model(tmp_path / "llama", attention_dropout=0.5)
    kept, recomputed = (
        fit(llama, tmp_path / again, MAX_STEPS="1", GRADIENT_CHECKPOINTING=again)[0].metrics[0]
        for again in ("false", "true")
    )
    for name in ("loss", "grad_norm"):
        assert recomputed[name] == pytest.approx(kept[name], rel=1e-5)


def test_the_balance_of_experts_is_no_part_of_the_loss(tmp_path: Path) -> None:
    mixtral = tiny.model(tmp_path / "mixtral", "mixtral", num_local_experts=4, router_aux_loss_coef=0.5)
    options = dict(MAX_STEPS="1", TARGET_MODULES="all-linear")
    whole, cut = (
        fit(mixtral, tmp_path / str(len(pieces)), **options, **pieces)[0].metrics[0] for pieces in ({}, PIECES)
    )
    for name in ("loss", "grad_norm"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-4)
    assert whole["loss"] == pytest.approx(6.9, abs=0.1)
