"""Training: the trainer's arguments, the run in the way it was planned, and what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl import SFTConfig

from finetune import console, patches
from finetune.engines.precision import compute_dtype
from finetune.settings import Settings
from finetune.training import checkpoints, plan, tracking
from finetune.training.batches import MicroBatches, Padded, Recipes
from finetune.training.evaluate import Course, Evaluation, Points, ended_early
from finetune.training.order import Order
from finetune.training.planner import Planner, limit
from finetune.training.trainer import Stop, UpdateTrainer, peak_gib
from finetune.training.update import Updates

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from finetune.data import Tokens
    from finetune.engines.choose import Choice
    from finetune.engines.engine import Engine

STREAM_ROWS = 64  # rows whose tokens are used to measure


@dataclasses.dataclass(frozen=True)
class Fit:
    """What training did. metrics: one row an update; times in seconds, memory in GiB. course: on held-out rows; None: not measured.

    plan_s: to measure what a token costs; most of it is compiling. started_s: from the start of the process to the
    end of its first update.
    """

    metrics: list[dict[str, float]]
    resumed_from: int | None
    plan_s: float
    first_step_s: float
    started_s: float
    peak_gib: float
    plan: plan.Plan
    course: Course | None = None

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
            plan=self.plan.record(),
        )


def fit(
    model: PeftModel, tokens: Tokens, tokenizer: PreTrainedTokenizerBase, settings: Settings, choice: Choice,
    engine: Engine, folder: Path, recorded: Mapping[str, Any] | None = None,
) -> Fit:  # fmt: skip
    """Train the adapter of `model` in place, from the newest whole checkpoint in `folder` if there is one.

    recorded: the plan of a recorded run. It is followed, because other pieces would round differently.

    Raises SystemExit(143) after SIGTERM, 130 after SIGINT, 129 after SIGHUP; Diverged where the loss is no longer a number,
    MachineError where a single row does not fit the memory.
    """
    tracking.begin(settings)
    arguments, stop, resume = _arguments(settings, folder), Stop(), checkpoints.newest(folder)
    followed = recorded
    metrics: list[dict[str, float]] = []
    if resume is not None:
        print(f"going on from {resume}", flush=True)
        metrics = json.loads((resume / "metrics.json").read_bytes())
        followed = json.loads((resume / "plan.json").read_bytes())
    recompute = functools.partial(engine.recompute, model)
    model.train()  # a new PeftModel says that it is in training mode, but the base inside it is not
    order = order_of(settings, tokens)
    with (
        stop.on_signals(metrics),
        _deterministic(choice.deterministic),
        patches.optimizer_does_not_wait(settings.optim),
        engine.path(model, choice.compiled, settings.rows_per_update, tokens.longest, tokens.common) as packed,
    ):
        batches = packed or _batches(model, arguments, tokens, tokenizer, settings, choice)
        stream = list(itertools.chain.from_iterable(tokens.dataset[:STREAM_ROWS]["input_ids"]))
        planner = Planner(model, batches, engine, recompute, settings, order, stream, tokens.longest, limit(settings))
        began = time.perf_counter()
        with console.stage(
            "training", "planning the updates" if torch.cuda.is_available() else "preparing the updates"
        ):
            chosen = planner.follow(plan.Plan.of(followed)) if followed else planner.choose()
        plan_s = time.perf_counter() - began
        print(f"plan: {chosen.describe()}", flush=True)
        arguments.gradient_checkpointing = engine.checkpointing(chosen.recomputed)
        updates = Updates(
            model, batches, chosen, settings.rows_per_update, recompute, may_recompute=settings.recomputes is None
        )
        evaluation = _evaluation(model, batches, tokens, chosen, resume)
        progress = console.Progress(order.updates, settings.logging_steps, len(metrics))
        trainer = UpdateTrainer(
            model, arguments, tokens.dataset, updates, metrics, progress, stop, settings, evaluation
        )
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if resume is not None and (checkpoints.is_last(resume) or ended_early(resume, settings)):
            # killed while merging: transformers would make one update more
            trainer._load_from_checkpoint(str(resume))
        else:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        best = evaluation.points.best if evaluation and settings.load_best_model_at_end else None
        if stop.signal is None and best is not None and best != metrics[-1]["step"]:
            print(f"taking the adapter after update {best}, which had the lowest loss on held-out rows", flush=True)
            trainer._load_from_checkpoint(str(folder / f"checkpoint-{best}"))
    progress.close()
    if stop.signal is not None:
        print(f"stopped at update {trainer.state.global_step}; the same command goes on from there", flush=True)
        raise SystemExit(128 + stop.signal)
    return Fit(
        metrics=metrics,
        resumed_from=int(resume.name.rpartition("-")[2]) if resume else None,
        plan_s=plan_s,
        first_step_s=trainer.first_step_s,
        started_s=trainer.started_s,
        peak_gib=peak_gib(),
        plan=updates.plan,
        course=_course(evaluation, best or int(metrics[-1]["step"]), best is not None),
    )


def _evaluation(
    model: PeftModel, batches: MicroBatches, tokens: Tokens, chosen: plan.Plan, resume: Path | None
) -> Evaluation | None:
    """What measures on the held-out rows, after it has measured the base or taken up what the resumed run has measured."""
    if tokens.held_out is None or not tokens.held_out.rows:
        return None
    # a piece is no larger than the largest of training, where that is known
    most = max(chosen.tokens, tokens.longest) if chosen.tokens else None
    made = Evaluation(model, batches, tokens.held_out.rows, chosen.micro_batch, most, tokens.longest)
    if not any(made.points.labels):
        print(f"held out: no rows, since none has a label within its first {tokens.longest} tokens", flush=True)
        return None
    points = Points.load(resume) if resume is not None else None
    if made.cut:
        print(
            f"held out: of {made.cut} rows only the first {tokens.longest} tokens count, as many as the longest trained row has",
            flush=True,
        )
    if points is not None and points.labels == made.points.labels:
        made.points = points
    elif resume is None:
        with console.stage("evaluating", f"measuring the loss on {len(made.rows)} held-out rows"):
            loss = made.measure(0)
        if loss is not None:
            print(f"held-out loss {loss:.4f} before training", flush=True)
    return made


def _course(evaluation: Evaluation | None, kept: int, best: bool) -> Course | None:
    """What the measurements say of a run that kept the adapter of update `kept`; None: it was not measured at both ends."""
    if evaluation is None or not {0, kept} <= set(evaluation.points.of):
        return None
    return Course(evaluation.points, kept, best, evaluation.cut, evaluation.seconds)


def order_of(settings: Settings, tokens: Tokens) -> Order:
    """The updates of a run."""
    return Order.of(
        tokens.lengths, settings.rows_per_update, settings.max_steps, settings.num_train_epochs or 1, settings.seed
    )


def _batches(
    model: PeftModel, arguments: Any, tokens: Tokens, tokenizer: PreTrainedTokenizerBase, settings: Settings, choice: Choice
) -> MicroBatches:  # fmt: skip
    """Micro-batches for a model that is not on the compiled path."""
    if choice.name != "unsloth":
        return Padded(model, tokenizer, compute_dtype(settings), tokens.dataset[0])
    from datasets import Dataset
    from trl import SFTTrainer

    # it makes micro-batches and losses of rows that are given to it, and goes through no data set; but it wants one
    some = Dataset.from_dict(tokens.dataset[:STREAM_ROWS])
    with patches.adapter_keeps_its_type(model):
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=some, processing_class=tokenizer)
    return Recipes(trainer)


@contextlib.contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """torch's deterministic algorithms for a while; memory that is written anyway need not be filled first."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def _arguments(settings: Settings, checkpoints: Path) -> Any:
    cuda, dtype = torch.cuda.is_available(), compute_dtype(settings)
    return SFTConfig(
        output_dir=str(checkpoints),
        per_device_train_batch_size=settings.rows_per_update,  # one batch is one update; its pieces are planned
        gradient_accumulation_steps=1,
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
        gradient_checkpointing=False,  # the plan decides: Engine.recompute
        router_aux_loss_coef=0.0,  # the loss comes from the labels alone: trl would add the experts' balance, once for each piece
        max_length=settings.max_seq_length,
        dataset_num_proc=None,
        logging_steps=1,  # every update is recorded; LOGGING_STEPS is about the lines printed
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps or 10**9,
        report_to=settings.report_to,
        run_name=settings.run_name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,  # rows become tensors later
    )


def describe(order: Order) -> str:
    """One line for the console, before training."""
    return f"training: {order.updates} updates, {order.rows} rows each"
