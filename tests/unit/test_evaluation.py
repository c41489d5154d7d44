"""Held-out rows are measured through the micro-batches of training, and training does not notice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from finetune import data
from finetune.engines.choose import Choice
from finetune.errors import Diverged
from finetune.settings import Settings
from finetune.sources.model import Source
from finetune.training import batches as micro
from finetune.training import checkpoints, evaluate, update
from short_run import fit
from unit.test_packed_training import attended  # noqa: F401  (a fixture)

# eight rows are trained and the eight after them held out
HALF = dict(DATASET_SPLIT="train[0:8]", GRADIENT_CHECKPOINTING="false")
OFTEN = {**HALF, "EVAL_STEPS": "2", "MAX_STEPS": "6", "SAVE_STEPS": "2", "SAVE_TOTAL_LIMIT": "1"}


def held(llama: Path, **values: str) -> list[dict[str, list[int]]]:
    settings = Settings.from_env(
        {
            "MODEL_NAME": str(llama),
            "DATASET_NAME": "samples",
            "DATASET_CONFIG": "en",
            "MAX_SEQ_LENGTH": "288",
            **HALF,
            **values,
        }
    )
    tokens = data.tokenize(data.load(settings), data.tokenizer(Source(str(llama), None, llama)), settings)
    assert tokens.held_out is not None and len(tokens.held_out.rows) == 8
    return tokens.held_out.rows


def reference(model: Any, rows: list[dict[str, list[int]]]) -> list[float]:
    """The model's own loss of each row, in float32, one row at a time."""
    found = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        target = torch.tensor(row["labels"][1:])
        found.append(float(torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")))
    return found


@pytest.mark.parametrize(
    ("kind", "changes", "values"),
    [
        ("llama", {}, {"TRAIN_ON": "response", "MAX_SEQ_LENGTH": "400"}), ("granite", dict(logits_scaling=0.01), {}), ("gpt2", {}, {}),
    ],
)  # fmt: skip
def test_the_base_s_losses_are_those_of_transformers(
    tmp_path: Path, kind: str, changes: dict[str, Any], values: dict[str, str]
) -> None:
    """Granite's logits are not the head's alone. GPT-2 has dropout in its base, which is off."""
    from transformers import AutoModelForCausalLM

    folder = tiny.model(tmp_path / "base", kind, **changes)
    named = dict(TARGET_MODULES="c_attn" if kind == "gpt2" else "q_proj,v_proj")
    found, _ = fit(folder, tmp_path / "run", MAX_STEPS="1", **HALF, **named, **values)
    assert found.course is not None
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = held(folder, **values)
    assert found.course.points.of[0] == pytest.approx(reference(own, rows), rel=1e-4)
    assert found.course.points.labels == [micro.labels_of([row]) for row in rows]


def test_the_packed_path_measures_the_same(llama: Path, tmp_path: Path, attended: list[int]) -> None:  # noqa: F811
    padded, _ = fit(llama, tmp_path / "padded", **HALF)
    packed, _ = fit(
        llama, tmp_path / "packed", Choice("transformers", "a test", compiled=True, deterministic=True), **HALF
    )
    assert attended and padded.course and packed.course
    for step in (0, 3):
        assert packed.course.points.of[step] == pytest.approx(padded.course.points.of[step], rel=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", ["0", "0.3"])
def test_training_s_bytes_are_those_without_evaluation(
    llama: Path,
    tmp_path: Path,
    attended: list[int],  # noqa: F811
    packed: bool,
    dropout: str,
) -> None:
    choice = Choice("transformers", "a test", compiled=packed, deterministic=True)
    values = {**OFTEN, "MAX_STEPS": "4", "LORA_DROPOUT": dropout}
    without, plain = fit(llama, tmp_path / "without", choice, **{**values, "EVAL_ROWS": "0", "EVAL_STEPS": "0"})
    measured, adapter = fit(llama, tmp_path / "with", choice, **values)
    assert without.course is None and measured.course is not None and sorted(measured.course.points.of) == [0, 2, 4]
    assert [row["loss"] for row in measured.metrics] == [row["loss"] for row in without.metrics]
    assert [row.get("eval_loss") for row in measured.metrics] == [
        None,
        measured.course.points.mean(2),
        None,
        measured.course.points.mean(4),
    ]
    assert all(torch.equal(adapter[name], plain[name]) for name in plain)


def test_memory_that_runs_out_halves_the_piece_and_no_run_ends(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, adapter = fit(llama, tmp_path / "whole", **HALF)
    real, most = micro.Padded.losses, [1]

    def losses(self: Any, rows: Any) -> Any:
        if len(rows) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(self, rows)

    monkeypatch.setattr(micro.Padded, "losses", losses)
    found, same = fit(llama, tmp_path / "halved", **HALF)
    assert "held-out rows are measured 2 at a time" in (said := capsys.readouterr().out) and "measured 1 at" in said
    assert found.course and expected.course and found.plan.micro_batch == 4
    assert found.course.points.of[3] == pytest.approx(expected.course.points.of[3], rel=1e-4)
    most[0] = 0
    none, other = fit(llama, tmp_path / "none", **HALF)
    assert none.course is None and "not measured" in capsys.readouterr().out
    assert all(torch.equal(adapter[name], each[name]) for each in (same, other) for name in adapter)


def test_a_loss_that_is_no_number_ends_the_run_unless_it_is_the_base_s(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, seen = micro.Padded.losses, [0]

    def losses(self: Any, rows: Any) -> Any:
        seen[0] += 1
        return real(self, rows) if seen[0] < first else [float("nan")] * len(rows)

    monkeypatch.setattr(micro.Padded, "losses", losses)
    first = 3  # two pieces are measured before training
    with pytest.raises(Diverged, match="step 3: the loss of a held-out row is nan"):
        fit(llama, tmp_path / "trained", **HALF)
    first = 0
    assert fit(llama, tmp_path / "base", **HALF)[0].course is None
    assert "the base's own loss of one of them is nan" in capsys.readouterr().out


def worse_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Each measurement after this update is worse than the one before, whatever training does."""
    real = evaluate.Evaluation._measure

    def measure(self: Any, at: int) -> None:
        real(self, at)
        if at > step:
            self.points.of[at] = [loss * at for loss in self.points.of[at]]

    monkeypatch.setattr(evaluate.Evaluation, "_measure", measure)


def killed_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The process ends after so many updates, with whatever checkpoints there are."""
    real = update.Updates.gradients

    def gradients(self: Any, rows: Any, backward: Any, at: int) -> Any:
        if at > number:
            raise KeyboardInterrupt
        return real(self, rows, backward, at)

    monkeypatch.setattr(update.Updates, "gradients", gradients)


@pytest.mark.parametrize("killed", [3, 5])
def test_the_best_adapter_is_kept_also_by_a_run_that_was_killed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    worse_after(monkeypatch, 2)
    values = {**OFTEN, "LOAD_BEST_MODEL_AT_END": "1"}
    whole, adapter = fit(llama, tmp_path / "whole", **values)
    assert whole.course is not None and (whole.course.kept, whole.course.best) == (2, True)
    kept = load_file(tmp_path / "whole" / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name.replace(".default", "")], value) for name, value in adapter.items())
    names = {path.name for path in checkpoints.folders(tmp_path / "whole")}
    assert names == {"checkpoint-2", "checkpoint-6"}  # the newest one and the best one
    with monkeypatch.context() as patched:
        killed_after(patched, killed)
        with pytest.raises(KeyboardInterrupt):
            fit(llama, tmp_path / "killed", **values)
    again, same = fit(llama, tmp_path / "killed", **values)
    assert again.resumed_from == killed - 1 and again.course is not None
    assert again.course.points == whole.course.points and again.course.kept == 2
    assert all(torch.equal(adapter[name], same[name]) for name in adapter)
    # a run that has ended is taken up only to merge, and chooses the same
    last, once_more = fit(llama, tmp_path / "killed", **values)
    assert last.course is not None and last.course.points == whole.course.points
    assert all(torch.equal(adapter[name], once_more[name]) for name in adapter)


def test_a_checkpoint_whose_best_one_is_damaged_counts_as_damaged(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worse_after(monkeypatch, 2)
    values = {**OFTEN, "LOAD_BEST_MODEL_AT_END": "1"}
    _, adapter = fit(llama, tmp_path, **values)
    (tmp_path / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"")
    again, same = fit(llama, tmp_path, **values)
    assert "needs checkpoint-2" in capsys.readouterr().out and again.resumed_from is None
    assert all(torch.equal(adapter[name], same[name]) for name in adapter)


def test_training_ends_early_and_stays_ended(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worse_after(monkeypatch, 1)
    values = {**OFTEN, "EVAL_STEPS": "1", "EARLY_STOPPING_PATIENCE": "2"}
    found, adapter = fit(llama, tmp_path, **values)
    assert [row["step"] for row in found.metrics] == [1, 2, 3] and found.course is not None and found.course.kept == 3
    again, same = fit(llama, tmp_path, **values)
    assert len(again.metrics) == 3 and again.course is not None and again.course.points == found.course.points
    assert all(torch.equal(adapter[name], same[name]) for name in adapter)


def test_the_counts_of_early_stopping() -> None:
    points = evaluate.Points([1])
    for step, (loss, without, small) in enumerate(
        [(9.0, 0, 0), (8.0, 0, 0), (8.0, 1, 1), (7.95, 0, 2), (7.8, 0, 0), (7.9, 1, 1)], 1
    ):
        points.of[step] = [loss]
        assert (points.without_gain(0.0), points.without_gain(0.1)) == (without, small), step
    assert points.best == 5


def test_points_come_back_from_a_checkpoint_as_they_were(tmp_path: Path) -> None:
    points = evaluate.Points([3, 4], {0: [1 / 3, 0.1], 20: [2 / 3, 1e-17]})
    points.save(tmp_path)
    assert evaluate.Points.load(tmp_path) == points
    shutil.rmtree(tmp_path)
    assert evaluate.Points.load(tmp_path) is None


def test_rows_longer_than_the_longest_trained_one_are_measured_up_to_there(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.loads((tiny.SAMPLES / "en.jsonl").read_text().splitlines()[0])
    rows = [{**row, "Question": f"{number} Why?", "Complex_CoT": "So.", "Response": "So."} for number in range(8)]
    long = [
        {**row, "Question": f"{number} When?", "Response": f"{number} and {7 * number} " * 30} for number in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [*rows, *long]))
    values = {
        **HALF,
        "DATASET_NAME": str(tmp_path / "rows.jsonl"),
        "DATASET_CONFIG": "",
        "MAX_SEQ_LENGTH": "1000",
        "MAX_STEPS": "1",
    }
    found, _ = fit(llama, tmp_path / "run", **values)
    assert found.course is not None and found.course.cut == 8
    assert "only the first" in capsys.readouterr().out
