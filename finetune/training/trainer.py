"""trl's trainer, with updates computed in planned pieces, each measured, checkpoints whole or not at all, and signals.

Import this module only when training begins: it needs trl, and with ENGINE=unsloth the one that unsloth has patched.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import SFTTrainer

from finetune import console, files
from finetune.data import IGNORE_INDEX
from finetune.errors import MachineError, Refusal
from finetune.training import checkpoints
from finetune.training.plan import Plan, pieces

if TYPE_CHECKING:
    from finetune.engines.compiled.path import MicroBatches

Row = dict[str, Any]


def peak_gib() -> float:
    """Peak memory so far in GiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def process_age() -> float:
    """Seconds since this process began."""
    began = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


class StopAtStep(TrainerCallback):
    """Ends the loop with a checkpoint at the first whole update after a signal."""

    def __init__(self, trainer: OurTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stop is not None:
            name = signal.Signals(self.trainer.stop).name
            print(f"{name}: saving a checkpoint after update {state.global_step}", flush=True)
            control.should_save = control.should_training_stop = True


class OurTrainer(SFTTrainer):
    """SFTTrainer for which one batch is one update. `begin` must be called, and plan and progress set, before `train`."""

    data_collator: Any
    plan: Plan
    progress: console.Progress

    def begin(
        self,
        folder: Path,
        keep: int,
        packed: MicroBatches | None,
        recompute: Callable[[int], None],
        may_recompute: bool,
    ) -> None:
        """folder, keep: where checkpoints go, and how many stay. packed: the compiled path's way to make a micro-batch.

        recompute(n): recompute the activations of the first n layers; may_recompute: also where the plan did not say so.
        """
        self.folder, self.keep, self.packed = folder, keep, packed
        self.recompute, self.may_recompute = recompute, may_recompute
        self.stop: int | None = None
        self.first_step_s = self.started_s = 0.0
        self.metrics: list[dict[str, float]] = []
        self.tokens = 0
        self.clock = time.perf_counter()
        self.collate = self.data_collator
        self.pads = packed is None and not getattr(self.data_collator, "padding_free", False)
        self.data_collator = _as_they_are
        if packed is None and self.args.loss_type == "chunked_nll" and not self._head_is_all():
            del self.model.get_base_model().forward  # trl's
            self.args.loss_type, self.compute_loss_func = "nll", _loss_of_logits
        # the loss is divided by our count, whatever the model says of itself
        self.model_accepts_loss_kwargs = True
        self.model.train()  # every module: a fresh PeftModel says that it trains, and its base, just loaded, does not
        self.accelerator.device_placement = False  # all of it is where it belongs, the embedding perhaps on the host
        self.remove_callback(PrinterCallback)
        self.add_callback(StopAtStep(self))

    def _head_is_all(self) -> bool:
        """Whether trl's loss in chunks is that of the model's own logits.

        It multiplies with the head itself, and knows little of what a model does to its logits then: Granite divides them by 8.
        So the head alone must give these logits to the bit. And trl must not do more to them than the model does, which is seen
        best where the labels are the words that the model takes for the least likely.
        """
        self.model.eval()  # nothing is drawn
        base = self.model.get_base_model()
        ids = torch.tensor([self.train_dataset[0]["input_ids"][:32]], device=self.args.device)
        try:
            with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
                outputs = type(base).forward(base, input_ids=ids, use_cache=False)
                hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
                if not torch.equal(base.get_output_embeddings()(hidden), outputs.logits):
                    return False
                labels = torch.cat([ids[:, :1], outputs.logits[:, :-1].argmin(-1)], 1)
                theirs = base.forward(input_ids=ids, labels=labels, output_router_logits=False).loss.float()
                own = _loss_of_logits(outputs, labels, labels.numel() - 1)
        except Exception:  # an architecture that trl does not know may raise anything: Llama 4 does
            return False
        return bool(torch.isclose(theirs, own, rtol=1e-5 if outputs.logits.dtype is torch.float32 else 2e-3))

    # One update, in pieces

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any = None) -> tuple[list[Any], None]:
        """The rows of the next update, not yet a tensor. unsloth has put one that counts labels in tensors in transformers' place."""
        found = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return found, None

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Gradients of one update, averaged over all its labels, whatever the pieces. Returns its loss.

        An update that does not fit the memory is begun anew under a smaller plan: nothing is lost, and nothing counts twice.
        """
        rows = inputs["update"].rows
        while True:
            try:
                loss = self._update(model, rows)
                break
            except torch.OutOfMemoryError as error:
                message = str(error).partition(". ")[0]
            self.forget(model)
            self.plan = self._smaller(message)
        self.tokens += sum(len(row["input_ids"]) for row in rows)
        return loss

    def _update(self, model: Any, rows: list[Row]) -> Any:
        count = torch.tensor(
            sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:]), device=self.args.device
        )
        losses = [self.piece(model, piece, count) for piece in pieces(rows, self.plan.micro_batch)]
        return torch.stack(losses).sum()

    def piece(self, model: Any, rows: Sequence[Row], count: Any) -> Any:
        """Forward and backward of some rows of an update that has `count` labels in all."""
        if self.packed is None:
            return super().training_step(model, self.collate(list(rows)), num_items_in_batch=count)
        loss = self.loss_of(model, rows, count)
        loss.backward()
        return loss.detach()

    def loss_of(self, model: Any, rows: Sequence[Row], count: Any) -> Any:
        """The share of some rows in the loss of an update, with its graph; also before `train` has begun."""
        if self.packed is not None:
            return self.packed.loss(rows, count)
        with self.compute_loss_context_manager(), self.accelerator.autocast():  # the model is not wrapped in it yet
            return self.compute_loss(model, self._prepare_inputs(self.collate(list(rows))), num_items_in_batch=count)

    def lengths(self, most: int) -> list[list[int]]:
        """Tokens of the rows of each update to come, in their order; of `most` updates at the most."""
        with torch.random.fork_rng(devices=[]):  # looking at the order must not change it
            order = self.get_train_dataloader().batch_sampler
            epochs = itertools.chain.from_iterable(iter(lambda: list(order), None))
            updates = list(itertools.islice(epochs, most))
        rows = sorted({index for batch in updates for index in batch})
        sizes = {index: len(ids) for index, ids in zip(rows, self.train_dataset.select(rows)["input_ids"], strict=True)}
        return [[sizes[index] for index in batch] for batch in updates]

    def forget(self, model: Any) -> None:
        """Forget what an interrupted update left behind."""
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()

    def _smaller(self, message: str) -> Plan:
        """The next smaller plan: weights in 4 bits alone, else half the micro-batch, else all layers recomputed.

        message: the allocator's. Raises MachineError where a single row does not fit even so.
        """
        # What was forecast was forecast for other pieces.
        before = dataclasses.replace(self.plan, tokens=0, forecast_gib=None, forecast_step_s=None, cost=None)
        again = f"out of GPU memory: update {self.state.global_step + 1} is repeated"
        if self.packed and before.dequantized:
            print(f"{again} with the weights in 4 bits alone", flush=True)
            self.packed.dequantize(False)
            return dataclasses.replace(before, dequantized=False, reason="weights not dequantized: out of GPU memory")
        if before.micro_batch == 1 and before.recomputed < before.layers and self.may_recompute:
            print(f"{again} with the activations of all layers recomputed", flush=True)
            self.recompute(before.layers)
            return dataclasses.replace(before, recomputed=before.layers, reason="recomputed: out of GPU memory")
        if before.micro_batch == 1:
            raise MachineError(
                f"out of GPU memory with one row at a time ({message}). Lower MAX_SEQ_LENGTH, for example "
                f"MAX_SEQ_LENGTH={self.args.max_length // 2}, lower LORA_R, or set GRADIENT_CHECKPOINTING=true."
            )
        size = before.micro_batch // 2
        accumulation = math.ceil(self.args.per_device_train_batch_size / size)  # of 3 + 3 + 2 rows come 8 pieces, not 9
        print(f"{again} as {size} x {accumulation}", flush=True)
        return dataclasses.replace(
            before, micro_batch=size, accumulation=accumulation, reason="halved: out of GPU memory"
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers would look for a tensor of tokens."""
        return 0

    # What each update leaves

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and "grad_norm" in logs:
            now = time.perf_counter()
            seconds, self.clock = now - self.clock, now
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
            self.tokens = 0
            if not self.first_step_s:
                self.first_step_s, self.started_s = seconds, process_age()
            if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
                raise Refusal(
                    f"step {row['step']}: the loss is {row['loss']}, the gradient norm {row['grad_norm']}; training has "
                    f"diverged. Try a lower LEARNING_RATE, for example LEARNING_RATE={self.args.learning_rate / 10:g}, "
                    "and OVERWRITE=1."
                )
            if left_out:
                print(f"step {row['step']}: left out, its scaled gradients overflow in float16", flush=True)
            self.metrics.append(row)
            self.progress.show(row)
            console.beat("training")
        super().log(logs, start_time)

    def _left_out(self) -> bool:
        """Whether GradScaler passed over this update: in float16 gradients are scaled up until they overflow, and then by half as much.

        Where they overflow unscaled, they are what has diverged.
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
        Trainer._save_checkpoint(self, model, trial)  # not SFTTrainer's, which writes a model card each time
        written = self.folder / "partial" / name
        files.write_json(written / "metrics.json", self.metrics)
        files.write_json(written / "plan.json", dataclasses.asdict(self.plan))
        files.write_json(written / "sha256.json", files.digests(written))
        files.publish(written, self.folder / name)
        files.remove(self.folder / "partial", ignore_errors=True)
        for old in checkpoints.folders(self.folder)[: -self.keep]:
            files.remove(old)
        self.clock = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Update:
    """The rows of one update, closed to accelerate, which would look at every single token on the way to the GPU."""

    rows: list[Row]


def _loss_of_logits(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
    """Cross entropy of all of a model's logits, divided by the labels of the whole update."""
    words = outputs.logits.shape[-1]
    logits, following = outputs.logits[:, :-1].reshape(-1, words).float(), labels[:, 1:].reshape(-1)
    return (
        torch.nn.functional.cross_entropy(logits, following, ignore_index=IGNORE_INDEX, reduction="sum")
        / num_items_in_batch
    )


def _as_they_are(rows: list[Row]) -> dict[str, Update]:
    return dict(update=Update(rows))
