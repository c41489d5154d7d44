"""What every row begins with (an instruction, a system prompt), computed once for all rows of a micro-batch.

Causal attention gives the same states to the same beginning, whatever follows. So the tokens lie as [beginning][rest of row 1]
[rest of row 2]…, and only attention knows more: there each row's keys and values have the beginning's in front, copied (`spread`).
They are narrow, and nothing else in a layer has to do with the copies. The gradients of all copies flow back into the one.
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
_library.define("spread(Tensor states, Tensor keys, Tensor copies, Tensor rests) -> Tensor")
_library.define("gathered(Tensor grad, Tensor copies, Tensor rests) -> Tensor")


class Layout(NamedTuple):
    """Where the beginning and the rests of rows lie.

    ends, key_ends: int32 (places + 2,), where the beginning and each row end, among tokens and among keys.
    keys: (keys,) the token of each key. copies: (rows + 1, shared) and rests: (tokens - shared,) where a token's keys are.
    """

    ends: Index
    key_ends: Index
    keys: Index
    copies: Index
    rests: Index


def layout(sizes: Sequence[int], shared: int, places: int) -> Layout:
    """How rows of these sizes lie whose first `shared` tokens are the same. places: the most rows that there can be."""
    missing = [0] * (places - len(sizes))
    ends = list(itertools.accumulate([shared, *(size - shared for size in sizes), *missing], initial=0))
    key_ends = list(itertools.accumulate([shared, *sizes, *missing], initial=0))
    first = np.arange(shared)
    rows = range(1, len(sizes) + 1)
    return Layout(
        ends=np.array(ends, np.int32),
        key_ends=np.array(key_ends, np.int32),
        keys=np.concatenate([first, *(part for row in rows for part in (first, np.arange(ends[row], ends[row + 1])))]),
        copies=np.array(key_ends[: len(sizes) + 1])[:, None] + first,
        rests=np.concatenate([np.arange(key_ends[row] + shared, key_ends[row + 1]) for row in rows]),
    )


def _gathered(grad: Tensor, copies: Tensor, rests: Tensor) -> Tensor:
    # Each token looks up its keys. The other way round, keys adding to tokens, takes atomics, and two runs differ. As an operator:
    # compiled, the order of this sum would hang on the number of rows that was seen first.
    return torch.cat([grad[copies].sum(0), grad[rests]])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.finetune.gathered(grad, *ctx.saved_tensors), None, None, None


_library.impl("spread", lambda states, keys, copies, rests: states[keys], "CompositeExplicitAutograd")
_library.impl("gathered", _gathered, "CompositeExplicitAutograd")
torch.library.register_fake(
    "finetune::spread", lambda states, keys, copies, rests: states.new_empty(keys.shape[0], *states.shape[1:])
)
torch.library.register_fake(
    "finetune::gathered",
    lambda grad, copies, rests: grad.new_empty(copies.shape[1] + rests.shape[0], *grad.shape[1:]),
)
torch.library.register_autograd("finetune::spread", _gradient, setup_context=_keep)
