"""What a run is planned with: the user's word is kept, and the rest is measured on this GPU (`probe`) and chosen (`plan`)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from finetune import plan
from finetune.settings import Settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from finetune.data import Tokens
    from finetune.engines import Engine
    from finetune.trainer import OurTrainer

MOST_UPDATES = 2000  # whose lengths are looked at; a longer run has its way out when memory runs out after all
MOST_TOKENS = 1024  # of the passes that are measured
ROOM_TO_WIDEN = (
    4  # times what 16-bit copies of the weights take; with less there is no room for whole updates beside them
)
OPTIMIZER_BYTES = {
    "adamw_8bit": 2,
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8,
}


def memory(settings: Settings) -> float | None:
    """Bytes of GPU memory that training may take, MAX_MEMORY at the most; None: no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    limit = float(free + torch.cuda.memory_reserved())
    if settings.max_memory:
        limit = min(limit, settings.max_memory * plan.GIB)
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    return limit


def updates(settings: Settings, tokens: Tokens) -> int:
    """Updates of the whole run, as transformers counts them."""
    if settings.max_steps > 0:
        return settings.max_steps
    per_epoch = math.ceil(len(tokens.dataset) / settings.rows_per_update)
    return math.ceil((settings.num_train_epochs or 1) * per_epoch)


@dataclasses.dataclass(frozen=True)
class Planner:
    """The plan for `limit` bytes of GPU memory. It leaves the model placed as the plan says, and without gradients."""

    trainer: OurTrainer
    model: PeftModel
    settings: Settings
    tokens: Tokens
    engine: Engine
    limit: float | None

    def choose(self) -> plan.Plan:
        """What the user set, and on a GPU the rest as it fits the memory."""
        if self.limit is None:
            return self._as_set("as set")
        import torch

        packed, model = self.trainer.packed, self.model
        if packed and 0 < ROOM_TO_WIDEN * packed.wide_bytes(model) < self.limit - torch.cuda.memory_allocated():
            packed.widen(model, True)
            if cost := self._measured():
                found = self._chosen(cost)
                fits = cost.peak(found.tokens, found.recomputed) <= plan.usable(self.limit)
                if fits and found.accumulation == 1 and found.recomputed == 0:
                    return dataclasses.replace(found, widened=True)
            packed.widen(model, False)
        movable = packed.movable(model) if packed else 0
        cost = self._measured()
        on_host = cost is None and movable > 0
        if packed and on_host:
            packed.place_embedding(model, on_host)
            cost = self._measured()
        if cost is None:
            alone = self._as_set("as set: there was no memory to measure what a token costs")
            return dataclasses.replace(alone, embedding_on_host=on_host)
        return self._chosen(dataclasses.replace(cost, fixed=cost.fixed + on_host * movable, movable=movable))

    def _as_set(self, reason: str) -> plan.Plan:
        layers = self.engine.layers(self.model)
        return plan.Plan(
            micro_batch=self.settings.per_device_train_batch_size, accumulation=self.settings.gradient_accumulation_steps,
            recomputed=layers if self.settings.gradient_checkpointing != "false" else 0, layers=layers, reason=reason,
        )  # fmt: skip

    def _measured(self) -> plan.Cost | None:
        """What a token costs; None where the memory does not even hold the passes that measure it."""
        import torch

        from finetune import probe

        model, settings = self.model, self.settings
        rows = self.trainer.train_dataset.select(range(min(64, len(self.tokens.dataset))))["input_ids"]
        stream = [token for ids in rows for token in ids]
        most = min(MOST_TOKENS, self.tokens.longest * settings.rows_per_update, len(stream))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        width = model.config.get_text_config().hidden_size * 2 * self.engine.KEEPS_INPUTS
        try:
            with torch.random.fork_rng():
                return probe.measure(
                    model, self.engine.layers(model), width, trained * OPTIMIZER_BYTES.get(settings.optim, 4), (most // 2, most),
                    lambda count, recomputed: self._loss(stream[:count], recomputed), partial=self.engine.PARTIAL,
                )  # fmt: skip
        except torch.OutOfMemoryError:
            return None
        finally:
            self.trainer.forget(model)

    def _loss(self, stream: list[int], recomputed: int) -> torch.Tensor:
        """A forward pass over so many tokens, as rows of equal lengths."""
        import torch

        self.trainer.recompute(recomputed)
        begin = min(self._shared(), len(stream) - 1)  # of each row, computed once
        rest = stream[begin:]
        rows = -(-len(rest) // (self.tokens.longest - begin))
        parts = [[*stream[:begin], *part] for part in plan.pieces(rest, -(-len(rest) // rows))]
        count = torch.tensor(len(stream), device="cuda")
        loss: torch.Tensor = self.trainer.loss_of(
            self.model, [dict(input_ids=part, labels=part) for part in parts], count
        )
        return loss

    def _chosen(self, cost: plan.Cost) -> plan.Plan:
        assert self.limit is not None
        settings = self.settings
        sized = settings.given & {"per_device_train_batch_size", "gradient_accumulation_steps"}
        return plan.choose(
            settings.rows_per_update, self.trainer.lengths(min(MOST_UPDATES, updates(settings, self.tokens))), cost,
            plan.usable(self.limit), padded=self.trainer.pads, shared=self._shared(),
            micro_batch=settings.per_device_train_batch_size if sized else None,
            recomputed=self._as_set("").recomputed if "gradient_checkpointing" in settings.given else None,
        )  # fmt: skip

    def _shared(self) -> int:
        return self.trainer.packed.shared if self.trainer.packed else 0
