"""What one token costs on this GPU with this model, measured before training: see `finetune.training.plan`."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from finetune.training.plan import Cost

FREE = 4  # layers that are not recomputed in two of the passes
EFFICIENCY = 0.6  # share of a matrix product's speed that a whole pass reaches (H100: benchmarks/h100)


@dataclasses.dataclass(frozen=True)
class Pass:
    """alive: bytes after the forward pass. forward, backward: the most bytes above that in each pass. seconds: of both."""

    alive: int
    forward: int
    backward: int
    seconds: float


def measure(
    model: Any, layers: int, width: int, optimizer_bytes: float, sizes: tuple[int, int],
    run: Callable[[int, int], torch.Tensor], *, partial: bool,
) -> Cost:  # fmt: skip
    """Run small passes forward and backward and return what a token costs.

    layers: of the model. width: bytes of one token that a recomputed layer keeps. optimizer_bytes: what the optimizer will take.
    sizes: tokens of the two passes between which a straight line is drawn. run(tokens, recomputed) makes a forward pass with the
    first `recomputed` layers recomputed, and returns the loss.
    partial: whether single layers can be recomputed. If so, all but a few are recomputed here, which fits a small card too.
    """
    free = min(FREE, layers) if partial else layers
    # The first pass compiles, chooses kernels and makes the gradients; what that takes is no part of a token's cost.
    for tokens in sizes:
        run(tokens, layers - free).backward()
    before = torch.cuda.memory_allocated()
    small, large = (_pass(run, tokens, layers - free) for tokens in sizes)
    span = sizes[1] - sizes[0]
    slope = (large.alive - small.alive) / span  # of all layers, and of what lies before and after them
    if partial:
        lean_small, lean_large = (_pass(run, tokens, layers) for tokens in sizes)
        outside = (lean_large.alive - lean_small.alive) / span - layers * width
        kept = (slope - outside - (layers - free) * width) / max(1, free)
    else:
        outside, kept = 0.0, slope / layers
    work = max(0.0, (large.backward - small.backward) / span)
    loss = max(0.0, (large.forward - small.forward) / span)
    return Cost(
        layers=layers, fixed=before + optimizer_bytes, outside=max(0.0, outside), kept=max(0.0, kept), kept_recomputed=width,
        work=large.backward - work * sizes[1], work_token=work, loss=large.forward - loss * sizes[1], loss_token=loss,
        partial=partial, launch_s=min(small.seconds, large.seconds) / (1 + (layers - free) / max(1, layers) / 2),
        token_s=4 * multiplied(model) / (EFFICIENCY * speed(4096)),
    )  # fmt: skip


def _pass(run: Callable[[int, int], torch.Tensor], tokens: int, recomputed: int) -> Pass:
    torch.cuda.synchronize()
    began = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    loss = run(tokens, recomputed)
    alive, forward = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    backward = torch.cuda.max_memory_allocated()
    torch.cuda.synchronize()
    return Pass(alive, max(0, forward - alive), max(0, backward - alive), time.perf_counter() - began)


def multiplied(model: Any) -> int:
    """Weights that each token is multiplied with, forward and backward: 4 FLOP each. PEFT's layers show their base's again."""
    linear = {id(m.weight): m.weight for m in model.modules() if type(m).__name__ in ("Linear", "Linear4bit", "Conv1D")}
    return sum(math.prod((getattr(w, "quant_state", None) or w).shape) for w in linear.values())


def speed(size: int) -> float:
    """FLOP a second of a bfloat16 (or float16) product of two square matrices on this GPU."""
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    a = torch.randn(size, size, device="cuda").to(dtype)
    count, seconds = 3, 0.0
    a @ a  # the first product of a process sets up the library
    while seconds < 0.05:  # an idle GPU needs time to reach its full clock
        count *= 4
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            a @ a
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return float(count * 2 * size**3 / seconds)
