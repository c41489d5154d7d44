"""What one token costs on this GPU with this model, measured before training: see `finetune.plan`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from finetune.plan import Cost

FREE = 4  # layers that are not recomputed meanwhile, so that even a small card holds the pass
EFFICIENCY = 0.6  # share of a matrix product's speed that a whole pass reaches (H100: benchmarks/h100)


def measure(
    model: Any, layers: int, width: int, optimizer_bytes: float, sizes: tuple[int, int],
    run: Callable[[int, int], torch.Tensor], *, partial: bool,
) -> Cost:  # fmt: skip
    """Run small passes forward and backward and return what a token costs.

    width: bytes of one token that a recomputed layer keeps. sizes: tokens of the two passes between which a straight line is
    drawn. run(tokens, recomputed) makes a forward pass with the first `recomputed` layers recomputed, and returns the loss.
    partial: whether single layers can be recomputed; else none is, meanwhile.
    """
    recomputed = layers - FREE if partial and layers > FREE else 0
    run(sizes[0], recomputed).backward()  # compiles, and makes the gradients
    before = torch.cuda.memory_allocated()
    found = []
    for tokens in sizes:
        torch.cuda.synchronize()
        began = time.perf_counter()
        torch.cuda.reset_peak_memory_stats()
        loss = run(tokens, recomputed)
        alive = torch.cuda.memory_allocated()
        forward = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss.backward()
        backward = torch.cuda.max_memory_allocated()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        del loss
        kept = alive - before - recomputed * width * tokens
        found.append((kept / (layers - recomputed), max(0, backward - alive), max(0, forward - alive)))
    (kept_a, work_a, loss_a), (kept_b, work_b, loss_b) = found
    span = sizes[1] - sizes[0]
    work_token, loss_token = max(0.0, (work_b - work_a) / span), max(0.0, (loss_b - loss_a) / span)
    return Cost(
        layers=layers, fixed=before + optimizer_bytes, kept=max(0.0, (kept_b - kept_a) / span), kept_recomputed=width,
        work=work_b - work_token * sizes[1], work_token=work_token,
        loss=loss_b - loss_token * sizes[1], loss_token=loss_token, partial=partial,
        launch_s=seconds / (1 + recomputed / layers / 2), token_s=4 * _weights(model) / (EFFICIENCY * speed(4096)),
    )  # fmt: skip


def _weights(model: Any) -> int:
    """Weights that each token is multiplied with, twice forward and twice backward: 2 FLOP each."""
    linear = [m.weight for m in model.modules() if type(m).__name__ in ("Linear", "Linear4bit", "Conv1D")]
    return sum(math.prod(getattr(w, "quant_state", w).shape) for w in linear)


def speed(size: int) -> float:
    """FLOP a second of a bfloat16 (or float16) product of two square matrices on this GPU."""
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    a = torch.randn(size, size, device="cuda").to(dtype)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    return float(10 * 2 * size**3 / (time.perf_counter() - began))
