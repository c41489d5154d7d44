"""What a run is planned with: the user's word is kept, and the rest is measured on this GPU (`probe`) and chosen (`plan`)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from typing import TYPE_CHECKING

from finetune.settings import Settings
from finetune.training import plan

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from finetune.data import Tokens
    from finetune.engines.engine import Engine
    from finetune.training.trainer import OurTrainer

MOST_UPDATES = 2000  # whose lengths are looked at; a longer run has its way out when memory runs out after all
MOST_TOKENS = 1024  # of the passes that are measured
ROOM_TO_DEQUANTIZE = (
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
    """Plans for `limit` bytes of GPU memory; None: no GPU. It leaves the model placed as the plan says, and without gradients."""

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
        return self._placed(self._dequantized() or self._narrow())

    def follow(self, recorded: plan.Plan) -> plan.Plan:
        """A plan made before, with nothing measured.

        What is compiled is compiled for the same sizes first as by `choose`, lest the order of a sum hang on them.
        """
        placed = self._placed(recorded)
        if self.trainer.packed and self.limit is not None:
            import torch

            stream, sizes = self._stream()
            with contextlib.suppress(torch.OutOfMemoryError), torch.random.fork_rng():
                self._loss(stream[: sizes[0]], recorded.recomputed).backward()
            self.trainer.forget(self.model)
        return placed

    def _placed(self, chosen: plan.Plan) -> plan.Plan:
        """The model placed as a plan says, and the plan as far as that can be."""
        packed = self.trainer.packed
        if not packed:
            return dataclasses.replace(chosen, embedding_on_host=False, dequantized=False)
        packed.place_embedding(chosen.embedding_on_host)
        return dataclasses.replace(chosen, dequantized=packed.dequantize(chosen.dequantized))

    def _dequantized(self) -> plan.Plan | None:
        """The plan with the weights dequantized, where whole updates without recomputing fit beside them."""
        import torch

        packed, limit = self.trainer.packed, self.limit
        assert limit is not None
        if (
            not packed
            or not 0 < ROOM_TO_DEQUANTIZE * packed.dequantized_bytes() < limit - torch.cuda.memory_allocated()
        ):
            return None
        cost = self._measured() if packed.dequantize(True) else None
        packed.dequantize(False)
        if cost is None:
            return None
        found = self._chosen(cost)
        whole = found.accumulation == 1 and found.recomputed == 0
        fits = cost.peak(found.tokens, found.recomputed) <= plan.usable(limit)
        return dataclasses.replace(found, dequantized=True) if whole and fits else None

    def _narrow(self) -> plan.Plan:
        """The plan with the weights in 4 bits alone, and the embedding moved away where that helps."""
        packed = self.trainer.packed
        movable = packed.movable() if packed else 0
        cost = self._measured()
        on_host = cost is None and movable > 0
        if packed and on_host:
            packed.place_embedding(on_host)
            cost = self._measured()
        if cost is None:
            alone = self._as_set("as set: there was no memory to measure what a token costs")
            return dataclasses.replace(alone, embedding_on_host=on_host)
        return self._chosen(dataclasses.replace(cost, fixed=cost.fixed + on_host * movable, movable=movable))

    def _as_set(self, reason: str) -> plan.Plan:
        return plan.Plan(
            micro_batch=self.settings.per_device_train_batch_size, accumulation=self.settings.gradient_accumulation_steps,
            recomputed=self._recomputed(), layers=self.engine.layers(self.model), reason=reason,
        )  # fmt: skip

    def _recomputed(self) -> int:
        """Layers that GRADIENT_CHECKPOINTING recomputes: all or none."""
        return 0 if self.settings.gradient_checkpointing == "false" else self.engine.layers(self.model)

    def _measured(self) -> plan.Cost | None:
        """What a token costs; None where the memory does not even hold the passes that measure it."""
        import torch

        from finetune.training import probe

        model = self.model
        stream, sizes = self._stream()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        width = model.config.get_text_config().hidden_size * 2 * self.engine.KEEPS_INPUTS
        try:
            with torch.random.fork_rng():
                return probe.measure(
                    model, self.engine.layers(model), width, trained * OPTIMIZER_BYTES.get(self.settings.optim, 4), sizes,
                    lambda count, recomputed: self._loss(stream[:count], recomputed), partial=self.engine.PARTIAL,
                )  # fmt: skip
        except torch.OutOfMemoryError:
            return None
        finally:
            self.trainer.forget(model)

    def _stream(self) -> tuple[list[int], tuple[int, int]]:
        """Tokens to measure with, and how many of them in a small and a large pass: no more than an update may have."""
        begin = self._shared()
        most = max(2, min(MOST_TOKENS, (self.tokens.longest - begin) * self.settings.rows_per_update))
        rows = itertools.cycle(self.trainer.train_dataset.select(range(min(64, len(self.tokens.dataset))))["input_ids"])
        stream = list(itertools.islice(itertools.chain.from_iterable(rows), begin + most))
        return stream, (begin + most // 2, begin + most)

    def _loss(self, stream: list[int], recomputed: int) -> torch.Tensor:
        """A forward pass over so many tokens, as rows of equal lengths after what all begin with.

        Where rows are filled up, one is shorter: what is filled up needs a mask, with which attention keeps more for each token.
        """
        import torch

        self.trainer.recompute(recomputed)
        begin, rest = stream[: self._shared()], stream[self._shared() :]
        filled = self.trainer.pads and len(rest) > 2 and self._most_rows() > 1
        rows = max(1 + filled, math.ceil(len(rest) / (self.tokens.longest - len(begin))))
        parts = [[*begin, *part] for part in plan.pieces(rest, math.ceil(len(rest) / rows))]
        if filled and len(parts[-1]) == len(parts[0]):
            parts[-1].pop()
        count = torch.tensor(len(stream), device=self.model.device)
        loss: torch.Tensor = self.trainer.loss_of(
            self.model, [dict(input_ids=part, labels=part) for part in parts], count
        )
        return loss

    def _chosen(self, cost: plan.Cost) -> plan.Plan:
        assert self.limit is not None
        settings = self.settings
        return plan.choose(
            settings.rows_per_update, self.trainer.lengths(min(MOST_UPDATES, updates(settings, self.tokens))), cost,
            plan.usable(self.limit), padded=self.trainer.pads, shared=self._shared(),
            micro_batch=self._rows_as_set(),
            recomputed=self._recomputed() if "gradient_checkpointing" in settings.given else None,
        )  # fmt: skip

    def _rows_as_set(self) -> int | None:
        """Rows of a piece where the user set them."""
        sized = self.settings.given & {"per_device_train_batch_size", "gradient_accumulation_steps"}
        return self.settings.per_device_train_batch_size if sized else None

    def _most_rows(self) -> int:
        return self._rows_as_set() or self.settings.rows_per_update

    def _shared(self) -> int:
        return self.trainer.packed.shared if self.trainer.packed else 0
