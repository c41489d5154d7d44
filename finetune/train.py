"""The training loop: trl's trainer, with our progress lines, per-step metrics, atomic checkpoints and signals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console, files
from finetune.errors import Refusal
from finetune.settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from finetune.data import Tokens


@dataclasses.dataclass(frozen=True)
class Fit:
    """What training did. metrics: one row an update; times in seconds, memory in GiB."""

    metrics: list[dict[str, float]]
    resumed_from: int | None
    first_step_s: float
    train_s: float
    peak_gib: float

    def record(self) -> dict[str, Any]:
        """The part of run.json on training. The median leaves out the first steps, which compile and warm up."""
        steps = sorted(row["step_s"] for row in self.metrics[min(8, len(self.metrics) // 2) :])
        seconds = sum(row["step_s"] for row in self.metrics)
        return dict(
            steps=int(self.metrics[-1]["step"]),
            epoch=self.metrics[-1]["epoch"],
            losses=[row["loss"] for row in self.metrics],
            step_s=steps[len(steps) // 2],
            tokens=int(sum(row["tokens"] for row in self.metrics)),
            tokens_per_s=round(sum(row["tokens"] for row in self.metrics) / seconds, 1),
            resumed_from=self.resumed_from,
        )


def fit(
    model: PeftModel, tokens: Tokens, tokenizer: PreTrainedTokenizerBase, settings: Settings, checkpoints: Path
) -> Fit:
    """Train the adapter of `model` in place, from the newest whole checkpoint if there is one.

    Raises SystemExit(143) after SIGTERM, SystemExit(130) after SIGINT, Refusal where the loss is no longer a number.
    """
    import torch

    trainer_type = _trainer_type()
    initial = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = trainer_type(
        model=model, args=_arguments(settings, checkpoints), train_dataset=tokens.dataset, processing_class=tokenizer
    )
    trainer.start(checkpoints, settings.save_total_limit)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in initial:
                p.data = initial[name]  # trl turns a 4-bit model's adapter to bfloat16, where updates of 2e-4 are lost
    resume = newest_checkpoint(checkpoints)
    if resume is not None:
        print(f"going on from {resume}", flush=True)
        trainer.metrics = json.loads((resume / "metrics.json").read_text())
    trainer.progress = console.Progress(updates(settings, tokens), settings.logging_steps, len(trainer.metrics))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with _signals(trainer):
        if resume is not None and _is_last(resume):  # killed while merging: transformers would make one update more
            trainer._load_from_checkpoint(str(resume))
        else:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.progress.close()
    seconds = time.perf_counter() - began
    if trainer.stop is not None:
        print(f"stopped at update {trainer.state.global_step}; the same command goes on from there", flush=True)
        raise SystemExit(128 + trainer.stop)
    return Fit(
        metrics=trainer.metrics,
        resumed_from=int(resume.name.rpartition("-")[2]) if resume else None,
        first_step_s=trainer.first_step_s,
        train_s=seconds,
        peak_gib=peak_gib(),
    )


def _is_last(checkpoint: Path) -> bool:
    """Whether all updates of the run are in the checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return bool(state["global_step"] >= state["max_steps"])


def peak_gib() -> float:
    """Peak memory so far in GiB: of the GPU where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _arguments(settings: Settings, checkpoints: Path) -> Any:
    import torch
    from trl import SFTConfig

    from finetune.engines import compute_dtype

    cuda, dtype = torch.cuda.is_available(), compute_dtype(settings)
    checkpointing = settings.gradient_checkpointing != "false"
    return SFTConfig(
        output_dir=str(checkpoints),
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        warmup_steps=settings.warmup_steps,
        max_steps=settings.max_steps,
        num_train_epochs=settings.num_train_epochs or 1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=cuda and dtype is torch.bfloat16,
        fp16=cuda and dtype is torch.float16,
        use_cpu=not cuda,
        gradient_checkpointing=checkpointing,
        max_length=settings.max_seq_length,
        dataset_num_proc=None,
        logging_steps=1,  # every update is recorded; LOGGING_STEPS is about the lines printed
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps or 10**9,
        report_to=settings.report_to,
        run_name=settings.run_name,
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
    )


def _trainer_type() -> Any:
    from transformers import PrinterCallback, Trainer, TrainerCallback
    from trl import SFTTrainer

    class StopAtStep(TrainerCallback):
        """Ends the loop with a checkpoint at the first whole update after a signal."""

        def __init__(self, trainer: Any):
            self.trainer = trainer

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.trainer.stop is not None:
                print(
                    f"{signal.Signals(self.trainer.stop).name}: saving a checkpoint after update {state.global_step}",
                    flush=True,
                )
                control.should_save = control.should_training_stop = True

    class OurTrainer(SFTTrainer):
        """SFTTrainer that measures each update, saves checkpoints whole or not at all, and stops on a signal."""

        def start(self, folder: Path, keep: int) -> None:
            self.folder, self.keep = folder, keep
            self.stop: int | None = None
            self.first_step_s = 0.0
            self.metrics: list[dict[str, float]] = []
            self.tokens = 0
            self.clock = time.perf_counter()
            self.remove_callback(PrinterCallback)
            self.add_callback(StopAtStep(self))

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            return super().training_step(model, inputs, *args, **kwargs)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs and "grad_norm" in logs:
                now = time.perf_counter()
                seconds, self.clock = now - self.clock, now
                row = dict(
                    step=self.state.global_step,
                    loss=float(logs["loss"]),
                    learning_rate=float(logs["learning_rate"]),
                    grad_norm=float(logs["grad_norm"]),
                    epoch=round(float(self.state.epoch or 0), 6),
                    tokens=self.tokens,
                    step_s=round(seconds, 4),
                    tokens_per_s=round(self.tokens / seconds, 1),
                    memory_gib=round(peak_gib(), 3),
                )
                self.tokens = 0
                self.first_step_s = self.first_step_s or seconds
                if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
                    raise Refusal(
                        f"step {row['step']}: the loss is {row['loss']}, the gradient norm {row['grad_norm']}; training has "
                        f"diverged. Try a lower LEARNING_RATE, for example LEARNING_RATE={self.args.learning_rate / 10:g}, "
                        "and OVERWRITE=1."
                    )
                self.metrics.append(row)
                self.progress.show(row)
                console.beat("training")
            super().log(logs, start_time)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            # neither tokenizer nor training_args.bin, which may hold the token; PEFT must not ask the Hub
            # about the base's vocabulary (LLaMA-Factory #2793)
            self.model.save_pretrained(output_dir, save_embedding_layers=False)

        def _get_output_dir(self, trial: Any) -> str:
            return str(self.folder / "partial")

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            """Write to checkpoints/partial, add the sha256 of every file, and only then give it its name."""
            name = f"checkpoint-{self.state.global_step}"
            if (self.folder / name).is_dir():
                return
            shutil.rmtree(self.folder / "partial", ignore_errors=True)
            Trainer._save_checkpoint(self, model, trial)  # not SFTTrainer's, which writes a model card each time
            written = self.folder / "partial" / name
            files.write_json(written / "metrics.json", self.metrics)
            files.write_json(written / "sha256.json", files.digests(written))
            files.publish(written, self.folder / name)
            shutil.rmtree(self.folder / "partial", ignore_errors=True)
            for old in checkpoint_folders(self.folder)[: -self.keep]:
                shutil.rmtree(old)
            self.clock = time.perf_counter()

    return OurTrainer


@contextlib.contextmanager
def _signals(trainer: Any) -> Iterator[None]:
    """SIGTERM and SIGINT end the loop at the next whole update; the same signal again ends the process at once."""

    def note(number: int, frame: Any) -> None:
        if trainer.stop is not None:
            raise SystemExit(128 + number)
        trainer.stop = number  # no print here: the signal may have come in the middle of one

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def updates(settings: Settings, tokens: Tokens) -> int:
    """Updates of the whole run, as transformers counts them."""
    if settings.max_steps > 0:
        return settings.max_steps
    batches = math.ceil(len(tokens.dataset) / settings.per_device_train_batch_size)
    per_epoch = math.ceil(batches / settings.gradient_accumulation_steps)
    return math.ceil((settings.num_train_epochs or 1) * per_epoch)


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoints with their final name, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files have the sha256 they were written with; a damaged one is named and passed over."""
    for path in reversed(checkpoint_folders(folder)):
        try:
            expected = json.loads((path / "sha256.json").read_text())
        except (OSError, ValueError):
            print(f"{path}: has no readable list of hashes; the checkpoint before it is used", flush=True)
            continue
        found = files.digests(path, [name for name in expected if (path / name).is_file()])
        damaged = sorted(name for name in expected if found.get(name) != expected[name])
        if not damaged:
            return path
        print(f"{path}: damaged or missing: {', '.join(damaged)}; the checkpoint before it is used", flush=True)
    return None
