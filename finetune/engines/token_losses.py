"""The loss of each token by itself, to measure and not to train: no gradient, and logits for a few tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.data import IGNORE_INDEX

CHUNK = 128  # tokens whose logits exist at a time, also in float32: 0.16 GiB in all at 128,256 words, less than training takes


@torch.no_grad()  # type: ignore[untyped-decorator]
def token_losses(hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Cross entropy (tokens,) in float32 of hidden (tokens, width) and labels (tokens,); 0 where there is no label.

    weight: (words, width), bias: (words,), of the model's head. Two calls give the same bytes.
    """
    losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        logits = torch.nn.functional.linear(hidden[part], weight.to(hidden.dtype), bias).float()
        target = labels[part].clamp(min=0)[:, None]
        losses[part] = logits.logsumexp(-1) - logits.gather(1, target)[:, 0]
    return losses.where(labels != IGNORE_INDEX, 0.0)


def of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The same of logits (tokens, words) that are there."""
    return torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
