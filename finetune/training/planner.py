"""Makes the plan of a run: keeps what the user set, and measures (`probe`) and chooses (`plan`) the rest on this GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from finetune.machine import memory
from finetune.settings import Settings
from finetune.training import plan, probe
from finetune.training.batches import MicroBatches
from finetune.training.order import Order
from finetune.training.update import forget

if TYPE_CHECKING:
    from peft import PeftModel

    from finetune.engines.engine import Engine

MOST_UPDATES = 2000  # whose lengths are read; in a longer run the plan gets smaller if memory runs out later
MOST_TOKENS = 1024  # of the passes that are measured
# times what 16-bit copies of the weights take; with less there is no room for whole updates beside them
ROOM_TO_DEQUANTIZE = 4
OPTIMIZER_BYTES = {
    "adamw_8bit": 2,
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8,
}


def limit(settings: Settings) -> float | None:
    """Bytes of GPU memory that training may take, MAX_MEMORY at the most, which the allocator keeps from now on; None: no GPU."""
    if not torch.cuda.is_available():
        return None
    most = memory.of_gpu(settings.max_memory)
    if settings.max_memory:
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / torch.cuda.mem_get_info()[1]))
    return most


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans for `limit` bytes of GPU memory; None: no GPU. It leaves the model placed as the plan says, and without gradients.

    stream: tokens of the first rows, to measure with. longest: tokens of the longest row. recompute(n): recompute the first n layers.
    """

    model: PeftModel
    batches: MicroBatches
    engine: Engine
    recompute: Callable[[int], None]
    settings: Settings
    order: Order
    stream: Sequence[int]
    longest: int
    limit: float | None

    def choose(self) -> plan.Plan:
        """What the user set, and on a GPU the rest as it fits the memory."""
        if self.limit is None:
            return self._as_set("as set")
        return self._placed(self._dequantized() or self._narrow())

    def follow(self, recorded: plan.Plan) -> plan.Plan:
        """Follow a plan that was made before, and measure nothing.

        Compile for the same first sizes as `choose` does, because the order of a sum may depend on them.
        """
        placed = self._placed(recorded)
        if not self.batches.pads and self.limit is not None:
            with contextlib.suppress(torch.OutOfMemoryError), torch.random.fork_rng():
                self._loss(self._sizes()[0], recorded.recomputed).backward()
            forget(self.model)
        return placed

    def _placed(self, chosen: plan.Plan) -> plan.Plan:
        """Place the model as a plan says. Returns the plan as far as it could be followed."""
        on_host = chosen.embedding_on_host and self.batches.movable() > 0
        self.batches.place_embedding(on_host)
        dequantized = self.batches.dequantize(chosen.dequantized)
        return dataclasses.replace(chosen, embedding_on_host=on_host, dequantized=dequantized)

    def _dequantized(self) -> plan.Plan | None:
        """The plan with the weights dequantized, where whole updates without recomputing fit beside them."""
        assert self.limit is not None
        room = self.limit - torch.cuda.memory_allocated()
        if not 0 < ROOM_TO_DEQUANTIZE * self.batches.dequantized_bytes() < room:
            return None
        cost = self._measured() if self.batches.dequantize(True) else None
        self.batches.dequantize(False)
        if cost is None:
            return None
        found = self._chosen(cost)
        whole = found.accumulation == 1 and found.recomputed == 0
        fits = cost.peak(found.tokens, found.recomputed) <= plan.usable(self.limit)
        return dataclasses.replace(found, dequantized=True) if whole and fits else None

    def _narrow(self) -> plan.Plan:
        """The plan with the weights in 4 bits alone, and the embedding moved away where that helps."""
        movable = self.batches.movable()
        cost = self._measured()
        on_host = cost is None and movable > 0
        if on_host:
            self.batches.place_embedding(True)
            cost = self._measured()
        if cost is None:
            alone = self._as_set("as set: there was no memory to measure what a token costs")
            return dataclasses.replace(alone, embedding_on_host=on_host)
        return self._chosen(dataclasses.replace(cost, fixed=cost.fixed + on_host * movable, movable=movable))

    def _as_set(self, reason: str) -> plan.Plan:
        layers, settings = self.engine.layers(self.model), self.settings
        size = settings.micro_batch or settings.rows_of_a_pass
        return plan.Plan(
            micro_batch=size, accumulation=math.ceil(settings.rows_per_update / size),
            recomputed=0 if settings.recomputes is False else layers, layers=layers, reason=reason,
        )  # fmt: skip

    def _measured(self) -> plan.Cost | None:
        """What a token costs; None where the memory does not even hold the passes that measure it."""
        model = self.model
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        width = model.config.get_text_config().hidden_size * 2 * self.engine.KEEPS_INPUTS
        try:
            with torch.random.fork_rng():
                return probe.measure(
                    model, self.engine.layers(model), width, trained * OPTIMIZER_BYTES.get(self.settings.optim, 4), self._sizes(),
                    self._loss, partial=self.engine.PARTIAL,
                )  # fmt: skip
        except torch.OutOfMemoryError:
            return None
        finally:
            forget(model)

    def _sizes(self) -> tuple[int, int]:
        """Tokens of a small and a large pass that are measured: no more than an update may have."""
        shared = self.batches.shared
        most = max(2, min(MOST_TOKENS, (self.longest - shared) * self.settings.rows_per_update))
        return shared + most // 2, shared + most

    def _loss(self, count: int, recomputed: int) -> torch.Tensor:
        """A forward pass over `count` tokens: the shared prefix, then rows of equal length.

        Where rows are padded, one row is shorter: padding needs a mask, and with a mask attention keeps more for each token.
        """
        self.recompute(recomputed)
        stream = list(itertools.islice(itertools.cycle(self.stream), count))
        begin, rest = stream[: self.batches.shared], stream[self.batches.shared :]
        filled = (
            self.batches.pads and len(rest) > 2 and (self.settings.micro_batch or self.settings.rows_per_update) > 1
        )
        rows = max(1 + filled, math.ceil(len(rest) / (self.longest - len(begin))))
        parts = [[*begin, *part] for part in plan.pieces(rest, math.ceil(len(rest) / rows))]
        if filled and len(parts[-1]) == len(parts[0]):
            parts[-1].pop()
        divisor = torch.tensor(len(stream), device=self.model.device)
        return self.batches.loss([dict(input_ids=part, labels=part) for part in parts], divisor)

    def _chosen(self, cost: plan.Cost) -> plan.Plan:
        assert self.limit is not None
        recomputes, layers = self.settings.recomputes, cost.layers
        return plan.choose(
            self.settings.rows_per_update, self.order.tokens(MOST_UPDATES), cost, plan.usable(self.limit), padded=self.batches.pads,
            shared=self.batches.shared, micro_batch=self.settings.micro_batch,
            recomputed=None if recomputes is None else layers * recomputes,
        )  # fmt: skip
