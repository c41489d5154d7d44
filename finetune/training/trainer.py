"""transformers' trainer, for which one batch is one update: it brings order, schedule, optimizer, clipping and what is resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

from finetune import console, files
from finetune.errors import Diverged
from finetune.machine import memory, signals
from finetune.settings import Settings
from finetune.training import checkpoints
from finetune.training.batches import Row
from finetune.training.evaluate import Evaluation, Measuring
from finetune.training.update import Updates


def peak_gib() -> float:
    """Peak memory so far in GiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return memory.peak_gib()


def process_age() -> float:
    """Seconds since this process began."""
    began = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


class Stop:
    """The signal that ends the run, once there is one."""

    signal: int | None = None

    @contextlib.contextmanager
    def on_signals(self, metrics: Sequence[Mapping[str, float]]) -> Iterator[None]:
        """A signal ends the loop at the next whole update; the same signal again ends the process at once.

        metrics: those of the updates so far, which say how long one takes.
        """

        def note(number: int, frame: Any) -> None:
            if self.signal is not None:
                signals.end(number, frame)
            self.signal = number

        def words() -> str:
            takes = f" (updates take about {metrics[-1]['step_s']:.1f} s)" if metrics else ""
            return f"a checkpoint is saved after this update{takes}; the same signal again ends the run at once"

        before = {number: signal.signal(number, note) for number in signals.heeded()}
        try:
            with signals.told(words):
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StopAtStep(TrainerCallback):
    """Ends the loop with a checkpoint at the first whole update after a signal."""

    def __init__(self, stop: Stop):
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop.signal is not None:
            name = signal.Signals(self.stop.signal).name
            print(f"{name}: saving a checkpoint after update {state.global_step}", flush=True)
            control.should_save = control.should_training_stop = True


class UpdateTrainer(Trainer):
    """Makes each update through `Updates`, notes its metrics, and writes checkpoints whole or not at all.

    metrics: one row for each update, also for those before a run was resumed.
    """

    def __init__(
        self, model: Any, args: Any, dataset: Any, updates: Updates, metrics: list[dict[str, float]],
        progress: console.Progress, stop: Stop, settings: Settings, evaluation: Evaluation | None,
    ):  # fmt: skip
        """evaluation: measures on held-out rows; None: there are none."""
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=_as_they_are)
        self.updates, self.metrics, self.progress, self.evaluation = updates, metrics, progress, evaluation
        self.keep, self.keeps_best = settings.save_total_limit, settings.load_best_model_at_end
        self.folder = Path(args.output_dir)
        self.first_step_s = self.started_s = 0.0
        self.tokens, self.clock, self.measured = 0, time.perf_counter(), evaluation.seconds if evaluation else 0.0
        self.accelerator.device_placement = False  # all of it is where it belongs, the embedding perhaps on the host
        self.remove_callback(PrinterCallback)
        if evaluation is not None:
            self.add_callback(Measuring(evaluation, settings))
        self.add_callback(StopAtStep(stop))

    # One update

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any = None) -> tuple[list[Any], None]:
        """The rows of the next update, not yet tensors. unsloth replaces transformers' method by one that counts labels in tensors."""
        found = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return found, None

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Gradients of one update. Returns its loss. The optimizer's step is transformers'."""
        rows = inputs["update"].rows
        loss = self.updates.gradients(rows, self.accelerator.backward, self.state.global_step + 1)
        self.tokens += sum(len(row["input_ids"]) for row in rows)
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers would look for a tensor of tokens."""
        return 0

    # What each update leaves

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Note an update. Raises Diverged where the loss is no longer a number."""
        if "loss" in logs and "grad_norm" in logs:
            self._note(logs)
        super().log(logs, start_time)

    def _note(self, logs: dict[str, float]) -> None:
        now, measured = time.perf_counter(), self.evaluation.seconds if self.evaluation else 0.0
        seconds = now - self.clock - (measured - self.measured)
        self.clock, self.measured = now, measured
        left_out = self._left_out()
        row = dict(
            step=self.state.global_step,
            loss=float(logs["loss"]),
            learning_rate=float(logs["learning_rate"]),
            grad_norm=0.0 if left_out else float(logs["grad_norm"]),
            epoch=round(float(self.state.epoch or 0), 6),
            tokens=self.tokens,
            step_s=round(seconds, 4),
            tokens_per_s=round(self.tokens / seconds, 1),
            memory_gib=round(peak_gib(), 3),
        )
        if self.evaluation and row["step"] in self.evaluation.points.of:
            row["eval_loss"] = logs["eval_loss"] = self.evaluation.points.mean(self.state.global_step)
        self.tokens = 0
        if not self.first_step_s:
            self.first_step_s, self.started_s = seconds, process_age()
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            raise Diverged(
                f"step {row['step']}: the loss is {row['loss']}, the gradient norm {row['grad_norm']}; training has "
                f"diverged. Try a lower LEARNING_RATE, for example LEARNING_RATE={self.args.learning_rate / 10:g}, "
                "and OVERWRITE=1."
            )
        if left_out:
            print(f"step {row['step']}: left out, its scaled gradients overflow in float16", flush=True)
        self.metrics.append(row)
        self.progress.show(row)
        console.beat("training")

    def _left_out(self) -> bool:
        """Whether GradScaler skipped this update. In float16 it raises the scale until gradients overflow, then halves it.

        If gradients overflow even unscaled, training has diverged.
        """
        scaler = self.accelerator.scaler
        return scaler is not None and self.accelerator.optimizer_step_was_skipped and scaler.get_scale() >= 1

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # neither tokenizer nor training_args.bin, which may hold the token; PEFT must not ask the Hub
        # about the base's vocabulary (LLaMA-Factory #2793)
        self.model.save_pretrained(output_dir, save_embedding_layers=False)
        files.open_as_its_neighbours(Path(output_dir or self.args.output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder / "partial")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write to checkpoints/partial, add the sha256 of every file, and only then give it its name."""
        name = f"checkpoint-{self.state.global_step}"
        if (self.folder / name).is_dir():
            return
        files.remove(self.folder / "partial")
        super()._save_checkpoint(model, trial)
        written = self.folder / "partial" / name
        files.write_json(written / "metrics.json", self.metrics)
        files.write_json(written / "plan.json", dataclasses.asdict(self.updates.plan))
        best = None
        if self.evaluation is not None:
            self.evaluation.points.save(written)
            best = self.evaluation.points.best if self.keeps_best else None
        if best is not None:
            files.write_json(written / checkpoints.BEST, f"checkpoint-{best}")
        files.write_json(written / "sha256.json", files.digests(written))
        files.publish(written, self.folder / name)
        files.remove(self.folder / "partial", ignore_errors=True)
        for old in checkpoints.folders(self.folder)[: -self.keep]:
            if old.name != f"checkpoint-{best}":
                files.remove(old)
        self.clock = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class UpdateRows:
    """The rows of one update, hidden from accelerate, which would visit every single token on the way to the GPU."""

    rows: list[Row]


def _as_they_are(rows: list[Row]) -> dict[str, UpdateRows]:
    return dict(update=UpdateRows(rows))
