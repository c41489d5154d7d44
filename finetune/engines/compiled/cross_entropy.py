"""The loss without the logits of whole rows: they exist for one chunk of tokens at a time."""

from __future__ import annotations

from typing import Any

import torch

CHUNK = 512  # tokens whose logits exist at a time: 0.12 GiB in bfloat16 at 128,256 words


class CrossEntropy(torch.autograd.Function):
    """Summed cross entropy of hidden (tokens, width) and labels (tokens,). counted (tokens,): how often each token counts.

    weight: frozen, (words, width).

    The gradient is computed in the forward pass, chunk by chunk, so that no logits are kept and none computed twice.
    Nothing is added up by atomics: two runs give the same bytes.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor
    ) -> torch.Tensor:
        step = _compiled_step if hidden.is_cuda else _step
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            losses, slope = step(hidden[part] @ weight.t(), labels[part], counted[part])
            total += losses.sum()
            torch.mm(slope, weight, out=gradient[part])
            del slope  # otherwise it stays until the next one is made: 0.12 GiB
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[0].to(gradient.dtype), None, None, None


def _step(logits: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each token (tokens,) and its gradient by the logits (tokens, words), computed in float32."""
    wide, target = logits.float(), labels.clamp(min=0)[:, None]
    norm = wide.logsumexp(-1, keepdim=True)
    losses = (norm - wide.gather(1, target))[:, 0] * counted
    hit = torch.arange(wide.shape[1], device=wide.device)[None] == target
    slope = ((wide - norm).exp() - hit.float()) * counted[:, None]
    return losses, slope.to(logits.dtype)


_compiled_step = torch.compile(_step, dynamic=True)
