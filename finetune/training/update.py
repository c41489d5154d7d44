"""One update, top to bottom: its rows, their pieces, forward and backward; and what is done where memory runs out on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import MachineError
from finetune.training.batches import MicroBatches, Row, labels_of
from finetune.training.plan import Plan, pieces

if TYPE_CHECKING:
    from torch import Tensor


class Updates:
    """Computes gradients of updates of `rows` rows by a plan, which gets smaller where memory runs out.

    recompute(n): recompute the activations of the first n layers. may_recompute: also where the plan did not say so.
    """

    def __init__(
        self, model: Any, batches: MicroBatches, plan: Plan, rows: int, recompute: Callable[[int], None], may_recompute: bool
    ):  # fmt: skip
        self.model, self.batches, self.plan, self.rows = model, batches, plan, rows
        self.recompute, self.may_recompute = recompute, may_recompute
        recompute(plan.recomputed)

    def gradients(self, rows: Sequence[Row], backward: Callable[[Tensor], object], number: int) -> Tensor:
        """Add the gradients of one update, averaged over all its labels, whatever the pieces. Returns its loss.

        An update that does not fit the memory is begun anew under a smaller plan: nothing is lost, and nothing counts twice.
        number: the update's, for messages. Raises MachineError where a single row does not fit.
        """
        while True:
            try:
                return self._whole(rows, backward)
            except torch.OutOfMemoryError as error:
                message = str(error).partition(". ")[0]
            forget(self.model)
            longest = max(len(row["input_ids"]) for row in rows)
            self.plan = self._smaller(f"out of GPU memory: update {number} is repeated", message, longest)

    def _whole(self, rows: Sequence[Row], backward: Callable[[Tensor], object]) -> Tensor:
        count = torch.tensor(labels_of(rows), device=self.model.device)
        losses = [self.piece(piece, count, backward) for piece in pieces(rows, self.plan.micro_batch)]
        return torch.stack(losses).sum()

    def piece(self, rows: Sequence[Row], count: Tensor, backward: Callable[[Tensor], object]) -> Tensor:
        """Forward and backward of some rows of an update that has `count` labels in all. Returns their share of its loss."""
        loss = self.batches.loss(rows, count)
        backward(loss)
        return loss.detach()

    def _smaller(self, again: str, message: str, longest: int) -> Plan:
        """The next smaller plan: weights in 4 bits alone, else half the micro-batch, else all layers recomputed."""
        # The forecasts were for the old pieces, so they are dropped.
        before = dataclasses.replace(self.plan, tokens=0, forecast_gib=None, forecast_step_s=None, cost=None)
        if before.dequantized:
            print(f"{again} with the weights in 4 bits alone", flush=True)
            self.batches.dequantize(False)
            return dataclasses.replace(before, dequantized=False, reason="weights not dequantized: out of GPU memory")
        if before.micro_batch == 1 and before.recomputed < before.layers and self.may_recompute:
            print(f"{again} with the activations of all layers recomputed", flush=True)
            self.recompute(before.layers)
            return dataclasses.replace(before, recomputed=before.layers, reason="recomputed: out of GPU memory")
        if before.micro_batch == 1:
            raise MachineError(
                f"out of GPU memory with one row at a time ({message}). Lower MAX_SEQ_LENGTH, for example "
                f"MAX_SEQ_LENGTH={longest // 2}, lower LORA_R, or set GRADIENT_CHECKPOINTING=true."
            )
        size = before.micro_batch // 2
        accumulation = math.ceil(self.rows / size)  # of 3 + 3 + 2 rows come 8 pieces, not 9
        print(f"{again} as {size} x {accumulation}", flush=True)
        return dataclasses.replace(
            before, micro_batch=size, accumulation=accumulation, reason="halved: out of GPU memory"
        )


def forget(model: Any) -> None:
    """Forget what an interrupted update left behind."""
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
