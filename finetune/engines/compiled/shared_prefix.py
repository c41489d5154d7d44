"""The shared prefix: what every row begins with (an instruction, a system prompt), computed once for all rows of a micro-batch.

Causal attention gives the same states to the same prefix, whatever follows. So the tokens lie as [prefix][rest of row 1][rest of row 2]…,
and only attention knows more: there each row's keys and values have copies of the prefix's in front (`finetune::shared_prefix`). They
are narrow, and nothing else in a layer deals with the copies. The gradients of all copies flow back into the one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Index = np.ndarray[Any, np.dtype[Any]]

_library = torch.library.Library("finetune", "FRAGMENT")
_library.define("shared_prefix(Tensor states, Tensor keys, Tensor copies, Tensor rests) -> Tensor")
_library.define("shared_prefix_backward(Tensor grad, Tensor copies, Tensor rests) -> Tensor")


class Layout(NamedTuple):
    """Where the shared prefix and the rests of rows lie.

    cu_seqlens, cu_seqlens_k: int32 (max_rows + 2,), where the prefix and each row end, among tokens and among keys.
    keys: (keys,) the token of each key. copies: (rows + 1, shared) and rests: (tokens - shared,) where a token's keys are.
    """

    cu_seqlens: Index
    cu_seqlens_k: Index
    keys: Index
    copies: Index
    rests: Index


def layout(sizes: Sequence[int], shared: int, max_rows: int) -> Layout:
    """How rows of these sizes lie whose first `shared` tokens are the same. max_rows: the most rows that there can be."""
    missing = [0] * (max_rows - len(sizes))
    cu_seqlens = list(itertools.accumulate([shared, *(size - shared for size in sizes), *missing], initial=0))
    cu_seqlens_k = list(itertools.accumulate([shared, *sizes, *missing], initial=0))
    first = np.arange(shared)
    rows = range(1, len(sizes) + 1)
    return Layout(
        cu_seqlens=np.array(cu_seqlens, np.int32),
        cu_seqlens_k=np.array(cu_seqlens_k, np.int32),
        keys=np.concatenate(
            [first, *(part for row in rows for part in (first, np.arange(cu_seqlens[row], cu_seqlens[row + 1])))]
        ),
        copies=np.array(cu_seqlens_k[: len(sizes) + 1])[:, None] + first,
        rests=np.concatenate([np.arange(cu_seqlens_k[row] + shared, cu_seqlens_k[row + 1]) for row in rows]),
    )


def _backward(grad: Tensor, copies: Tensor, rests: Tensor) -> Tensor:
    # Each token gathers the gradients of its keys. The other way, keys adding to tokens, needs atomics, and two runs would differ. It is
    # an operator because, if compiled, the order of this sum would depend on the first number of rows that was seen.
    return torch.cat([grad[copies].sum(0), grad[rests]])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.finetune.shared_prefix_backward(grad, *ctx.saved_tensors), None, None, None


_library.impl("shared_prefix", lambda states, keys, copies, rests: states[keys], "CompositeExplicitAutograd")
_library.impl("shared_prefix_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "finetune::shared_prefix", lambda states, keys, copies, rests: states.new_empty(keys.shape[0], *states.shape[1:])
)
torch.library.register_fake(
    "finetune::shared_prefix_backward",
    lambda grad, copies, rests: grad.new_empty(copies.shape[1] + rests.shape[0], *grad.shape[1:]),
)
torch.library.register_autograd("finetune::shared_prefix", _gradient, setup_context=_keep)
