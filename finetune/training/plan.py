"""Arithmetic: how the rows of one update are cut into pieces that fit the memory. Standard library only.

The recipe fixes how many rows make an update. The number of forward passes for them changes only rounding, time and
memory. `choose` takes the fewest pieces that fit, and then recomputes the activations of as few layers as possible. A
piece's memory is worked out from what a token costs, which `finetune.training.probe` measures on the model itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GIB = 2**30
COPIED = 0.1  # at most, of what a token keeps in a layer, its keys and values: 4 of 140 KB with 8 heads of 32 (Llama 3), 16 of 150 with all


@dataclasses.dataclass(frozen=True)
class Cost:
    """What training takes, in bytes; `per token` where it says so.

    fixed: weights, adapter, gradients and optimizer. movable: what of it can wait in the host's memory: the input embedding.
    outside: per token, from the forward to the backward pass, before and after the layers. kept: the same per token and layer.
    kept_recomputed: the same where the layer is recomputed (its input). work, work_token: on top while a layer goes backward.
    loss, loss_token: on top while the loss is computed. partial: some layers may be recomputed and others not.
    launch_s, token_s: seconds for a piece whatever its size, and for the arithmetic of each of its tokens.
    """

    layers: int
    fixed: float
    outside: float
    kept: float
    kept_recomputed: float
    work: float
    work_token: float
    loss: float
    loss_token: float
    partial: bool = True
    movable: float = 0.0
    launch_s: float = 0.0
    token_s: float = 0.0

    def seconds(self, tokens: int, recomputed: int) -> float:
        """Time of a piece, in seconds: recomputing a layer adds a forward pass to the forward and the backward one."""
        share = recomputed / max(1, self.layers)
        return max(self.launch_s, self.token_s * tokens) * (1 + share / 2)

    def peak(self, tokens: int, recomputed: int) -> float:
        """Peak memory of a piece of `tokens` tokens with the first `recomputed` layers recomputed, in bytes.

        The peak is at the loss, or in the first backward step of a kept layer, or of a recomputed one. A recomputed layer's
        activations come back when those of the layers after it are gone.
        """
        inputs = (self.outside + recomputed * self.kept_recomputed) * tokens
        alive = inputs + (self.layers - recomputed) * self.kept * tokens
        work = self.work + self.work_token * tokens
        peaks = [alive + self.loss + self.loss_token * tokens]
        if recomputed < max(1, self.layers):  # 0: a model of which no layer can be recomputed
            peaks.append(alive + work)
        if recomputed:
            peaks.append(inputs + (self.kept - self.kept_recomputed) * tokens + work)  # its input is there already
        return self.fixed + max(peaks)

    def recomputed(self, tokens: int, limit: float) -> int | None:
        """The fewest recomputed layers with which `tokens` tokens stay under `limit` bytes; None: not even all."""
        steps = range(self.layers + 1) if self.partial else (0, self.layers)
        return next((count for count in steps if self.peak(tokens, count) <= limit), None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one update is computed. recomputed: layers whose activations are recomputed, of `layers`.

    embedding_on_host: whether the input embedding waits in the host's memory, and only the rows of a piece come over.
    dequantized: whether the 4-bit weights are kept in 16 bits too, in which they are multiplied.
    cost: the `Cost` that the forecasts were worked out from.
    """

    micro_batch: int
    accumulation: int
    recomputed: int
    layers: int
    reason: str
    embedding_on_host: bool = False
    dequantized: bool = False
    tokens: int = 0
    limit_gib: float | None = None
    forecast_gib: float | None = None
    forecast_step_s: float | None = None
    cost: Mapping[str, float] | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Plan:
        """The plan of a run.json, or of a checkpoint."""
        return cls(**{field.name: record[field.name] for field in dataclasses.fields(cls) if field.name in record})

    @property
    def checkpointing(self) -> str:
        return "none" if not self.recomputed else "full" if self.recomputed == self.layers else "selective"

    def describe(self) -> str:
        """One line for the console."""
        some = f" ({self.recomputed} of {self.layers} layers)" if self.checkpointing == "selective" else ""
        place = (
            ", embedding on the host"
            if self.embedding_on_host
            else ", weights dequantized once"
            if self.dequantized
            else ""
        )
        memory = f", {self.forecast_gib:.1f} GiB expected" if self.forecast_gib else ""
        return f"{self.micro_batch} x {self.accumulation}, checkpointing {self.checkpointing}{some}{place}{memory}; {self.reason}"

    def record(self) -> dict[str, Any]:
        """The part of run.json on the plan."""
        return {**dataclasses.asdict(self), "checkpointing": self.checkpointing}


def usable(memory: float) -> float:
    """How many of `memory` free bytes a plan may use: the allocator's segments are never quite full."""
    return 0.98 * memory - 0.1 * GIB


def pieces(rows: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """`rows` in their order, at most `size` at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def choose(
    rows_per_update: int, updates: Sequence[Sequence[int]], cost: Cost, limit: float, *, padded: bool = False, shared: int = 0,
    micro_batch: int | None = None, recomputed: int | None = None,
) -> Plan:  # fmt: skip
    """The plan with the fewest pieces that fit `limit` bytes, and among those with the fewest recomputed layers.

    updates: the lengths of the rows of each, in tokens. padded: a piece is filled up to its longest row. shared: tokens that all
    rows begin with and a piece computes once, copying their keys and values for each row.
    micro_batch, recomputed: what the user set, which is kept as it is. What is movable moves if that saves a piece. If
    nothing fits, the smallest plan is returned: the forecast has a margin, and training makes the plan smaller if memory runs out.
    """

    def sizes_of(size: int, lengths: Sequence[int]) -> list[int]:
        if padded:
            return [len(piece) * max(piece) for piece in pieces(lengths, size)]
        copied = round(COPIED * shared)
        return [sum(piece) - (len(piece) - 1) * shared + len(piece) * copied for piece in pieces(lengths, size)]

    def tokens(size: int) -> int:
        return max(count for lengths in updates for count in sizes_of(size, lengths))

    def fewest(limit: float) -> tuple[int, int] | None:
        """Rows a piece and recomputed layers under `limit` bytes."""
        for size in sizes:
            layers = cost.recomputed(tokens(size), limit) if recomputed is None else recomputed
            if layers is not None and cost.peak(tokens(size), layers) <= limit:
                return size, layers
        return None

    every = {-(-rows_per_update // count) for count in range(1, rows_per_update + 1)}  # 8, 4, 3 (3 + 3 + 2), 2, 1
    sizes = [micro_batch] if micro_batch else sorted(every, reverse=True)
    found, on_host = fewest(limit), False
    if cost.movable and (not found or found[0] < sizes[0]):
        moved = fewest(limit + cost.movable)
        if not found or (moved and moved[0] > found[0]):
            found, on_host = moved, True
    size, layers = found or (sizes[-1], cost.layers if recomputed is None else recomputed)
    reason = f"the fewest pieces that fit {limit / GIB:.1f} GiB" if found else "nothing smaller is left to try"
    if micro_batch:
        reason = "as set" if recomputed is not None else f"{micro_batch} rows as set; {reason}"
    seconds = [sum(cost.seconds(count, layers) for count in sizes_of(size, lengths)) for lengths in updates]
    peak = cost.peak(tokens(size), layers) - on_host * cost.movable
    return Plan(
        micro_batch=size, accumulation=-(-rows_per_update // size), recomputed=layers, layers=cost.layers, reason=reason,
        embedding_on_host=on_host, tokens=tokens(size), limit_gib=round(limit / GIB, 3), forecast_gib=round(peak / GIB, 3),
        forecast_step_s=round(sum(seconds) / len(seconds), 3), cost=dataclasses.asdict(cost),
    )  # fmt: skip
