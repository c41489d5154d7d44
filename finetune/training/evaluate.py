"""Did it help? The loss on held-out rows, measured before, during and after training, through the micro-batches of training.

Nothing of training changes: no random number is drawn, no gradient is left, and the plan is not touched. The figures of each row are
kept in the checkpoints, so that a run that was resumed has the same ones.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from finetune import console, files
from finetune.errors import Diverged, MachineError
from finetune.training.batches import MicroBatches, Row, labels_of
from finetune.training.update import forget

if TYPE_CHECKING:
    from finetune.settings import Settings

FILE = "evaluation.json"  # in a checkpoint


@dataclasses.dataclass
class Points:
    """What was measured. of: update -> summed loss of each row; update 0 is the base, since a new adapter adds zero.

    labels: of each row, that the loss is on.
    """

    labels: list[int]
    of: dict[int, list[float]] = dataclasses.field(default_factory=dict)

    def mean(self, update: int) -> float:
        """The mean loss of a label after so many updates."""
        return sum(self.of[update]) / sum(self.labels)

    @property
    def trained(self) -> list[int]:
        """The updates after which the loss was measured, without the base."""
        return sorted(update for update in self.of if update)

    @property
    def best(self) -> int | None:
        """The update after which the loss was the lowest, the first of several; None: nothing was measured yet."""
        return min(self.trained, key=lambda update: (self.mean(update), update), default=None)

    def without_gain(self, threshold: float) -> int:
        """How many measurements in a row, up to the last, did not lower the lowest loss by more than `threshold`."""
        lowest, count = float("inf"), 0
        for update in self.trained:
            gained = self.mean(update) < lowest - threshold
            count = 0 if gained else count + 1
            lowest = self.mean(update) if gained else lowest
        return count

    def save(self, checkpoint: Path) -> None:
        """Keep them in a checkpoint."""
        files.write_json(checkpoint / FILE, dict(labels=self.labels, of={str(k): v for k, v in self.of.items()}))

    @classmethod
    def load(cls, checkpoint: Path) -> Points | None:
        """Those that a checkpoint keeps; None: it was made without a measurement."""
        if not (checkpoint / FILE).is_file():
            return None
        found = json.loads((checkpoint / FILE).read_bytes())
        return cls(found["labels"], {int(update): losses for update, losses in found["of"].items()})


class Evaluation:
    """Measures the loss on `rows`. size, most: rows and tokens of a piece at the most; most None: any number. seconds: of all measurements.

    longest: tokens of the longest row that is trained. Of a longer row only its beginning counts, because neither memory nor compiled
    code was made ready for more; cut: how many these are.
    """

    def __init__(
        self, model: Any, batches: MicroBatches, rows: Sequence[Row], size: int, most: int | None, longest: int
    ):
        self.model, self.batches = model, batches
        self.rows = [{name: row[name][:longest] for name in ("input_ids", "labels")} for row in rows]
        self.cut = sum(len(row["input_ids"]) > longest for row in rows)
        self.points = Points([labels_of([row]) for row in self.rows])
        self.size, self.most, self.longest = size, most, longest
        self.seconds = 0.0

    def measure(self, update: int) -> float | None:
        """The mean loss of a label after so many updates; None: it cannot be measured. Measured once.

        Raises Diverged where training has made it no number.
        """
        if update not in self.points.of and self.rows:
            began = time.perf_counter()
            with torch.random.fork_rng():
                self._measure(update)
            self.seconds += time.perf_counter() - began
        return self.points.mean(update) if update in self.points.of else None

    def _measure(self, update: int) -> None:
        found: dict[int, float] = {}
        try:
            for piece in self._pieces():
                found |= self._losses(piece)
                console.beat("evaluating")
        except torch.OutOfMemoryError:
            forget(self.model)
            return self._give_up("one row alone does not fit the memory")
        odd = next((loss for loss in found.values() if not math.isfinite(loss)), None)
        if odd is not None and update:
            raise Diverged(
                f"step {update}: the loss of a held-out row is {odd}; training has diverged. Try a lower LEARNING_RATE, and OVERWRITE=1."
            )
        if odd is not None:
            return self._give_up(f"the base's own loss of one of them is {odd}")
        self.points.of[update] = [found[index] for index in range(len(self.rows))]

    def _give_up(self, why: str) -> None:
        print(f"held-out rows: not measured, since {why}", flush=True)
        self.rows = []

    def _losses(self, piece: list[int]) -> dict[int, float]:
        """The losses of some rows; where memory runs out, half as many at a time, from now on."""
        try:
            return dict(zip(piece, self.batches.losses([self.rows[index] for index in piece]), strict=True))
        except torch.OutOfMemoryError:
            if len(piece) == 1:
                raise
        forget(self.model)
        self.size = (len(piece) + 1) // 2
        print(f"out of GPU memory: held-out rows are measured {self.size} at a time", flush=True)
        return self._losses(piece[: self.size]) | self._losses(piece[self.size :])

    def _pieces(self) -> Iterator[list[int]]:
        """The rows by their length, in pieces that training's memory holds: filled up or not, a piece is no larger than the largest there."""
        beginnings = [self.batches.beginning(row) for row in self.rows]
        sizes = [len(row["input_ids"]) for row in self.rows]
        piece: list[int] = []
        for index in sorted(range(len(sizes)), key=lambda index: (beginnings[index], sizes[index], index)):
            room = self.most is None or (len(piece) + 1) * sizes[index] <= self.most
            fits = room and len(piece) < self.size
            if piece and not (fits and beginnings[piece[0]] == beginnings[index]):
                yield piece
                piece = []
            piece.append(index)
        yield piece


@dataclasses.dataclass(frozen=True)
class Course:
    """What came of the measurements. kept: the update whose adapter was kept; best: whether it was chosen for its loss."""

    points: Points
    kept: int
    best: bool
    cut: int
    seconds: float


class Measuring(TrainerCallback):
    """Measures every `EVAL_STEPS` updates and after the last one; keeps the best checkpoint, and ends training early, where asked."""

    def __init__(self, evaluation: Evaluation, settings: Settings):
        self.evaluation, self.settings = evaluation, settings

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        settings, update = self.settings, state.global_step
        due = settings.eval_steps and update % settings.eval_steps == 0
        if not due and update < state.max_steps:
            return
        loss = self.evaluation.measure(update)
        if loss is None:
            if settings.load_best_model_at_end or settings.early_stopping_patience:
                raise MachineError(
                    "EVAL_STEPS: the held-out rows cannot be measured (above), and LOAD_BEST_MODEL_AT_END or EARLY_STOPPING_PATIENCE need "
                    f"them; lower MAX_SEQ_LENGTH, for example MAX_SEQ_LENGTH={self.evaluation.longest // 2}"
                )
            return
        print(f"held-out loss {loss:.4f} after update {update}", flush=True)
        if settings.load_best_model_at_end and self.evaluation.points.best == update:
            control.should_save = True
        if settings.early_stopping_patience and update < state.max_steps:
            without = self.evaluation.points.without_gain(settings.early_stopping_threshold)
            if without >= settings.early_stopping_patience:
                print(f"{without} measurements without a lower loss: training ends after update {update}", flush=True)
                control.should_save = control.should_training_stop = True


def ended_early(checkpoint: Path, settings: Settings) -> bool:
    """Whether training ended early with this checkpoint."""
    points = Points.load(checkpoint)
    patience = settings.early_stopping_patience
    return points is not None and 0 < patience <= points.without_gain(settings.early_stopping_threshold)
