"""A frozen linear layer and its adapter as one operator, `finetune::lora_linear`: B A x is added by W x's own matrix product.

A sum in float32 that is rounded once keeps what a young adapter adds, which is smaller than the last bit of W x. A CPU sums so; cuBLAS
on an H100 rounds W x first, as peft does (docs/adr/0403). It is an operator with its own gradient, so that torch's compiler can cache
the layer. With bitsandbytes' autograd.Function it could not.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes  # noqa: F401  (its operators)
import torch
from torch import Tensor

NESTED_BLOCK = 256  # absmax values that share a scale, with double quantisation

_library = torch.library.Library("finetune", "DEF")
_frozen = "Tensor weight, int[] shape, Tensor? absmax, int blocksize, str kind, Tensor? absmax_8bit, Tensor? code, Tensor? offset"
_library.define(f"dequantize(ScalarType dtype, {_frozen}) -> Tensor")
_library.define(f"lora_linear(Tensor x, Tensor inner, Tensor up, {_frozen}) -> Tensor")


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Forward of a PEFT linear layer without its conversions. x: (..., in), 16 bits; the adapter is rounded to x's type."""
    (name,) = self.active_adapters
    down = self.lora_A[name].weight.to(x.dtype)
    up = (self.lora_B[name].weight * self.scaling[name]).to(x.dtype)
    inner = self.lora_dropout[name](x) @ down.t()
    out: Tensor = torch.ops.finetune.lora_linear(x, inner, up, *_parts(self.base_layer.weight))
    bias = self.base_layer.bias
    return out if bias is None else out + bias


def dequantize(layer: Any, on: bool) -> None:
    """Keep a bfloat16 copy of a PEFT layer's frozen 4-bit weight for its products, or drop it. The results are the same."""
    base = layer.base_layer
    if on and getattr(base.weight, "quant_state", None) is not None:
        wide = _dequantized(torch.bfloat16, *_parts(base.weight))
        base.__dict__["narrow"], base.weight = base.weight, torch.nn.Parameter(wide, requires_grad=False)
    elif not on and "narrow" in base.__dict__:
        base.weight = base.__dict__.pop("narrow")


def _parts(weight: Any) -> tuple[Any, ...]:
    """The arguments that stand for a frozen weight: bitsandbytes' 4 bits in parts, or the weight itself."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight, weight.shape, None, 0, "", None, None, None
    packed = weight.data.view(-1, 1)
    if not state.nested:
        return packed, state.shape, state.absmax, state.blocksize, state.quant_type, None, None, None
    outer = state.state2
    return (
        packed, state.shape, outer.absmax, state.blocksize, state.quant_type, state.absmax, outer.code, state.offset,
    )  # fmt: skip


def _dequantized(
    dtype: torch.dtype, weight: Tensor, shape: list[int], absmax: Tensor, blocksize: int, kind: str,
    absmax_8bit: Tensor | None, code: Tensor | None, offset: Tensor | None,
) -> Tensor:  # fmt: skip
    """A 4-bit weight in `dtype`, (out, in)."""
    if absmax_8bit is not None:
        bnb = torch.ops.bitsandbytes.dequantize_blockwise
        absmax = bnb(absmax_8bit, absmax, code, NESTED_BLOCK, torch.float32) + offset
    out: Tensor = torch.ops.bitsandbytes.dequantize_4bit(weight, absmax, blocksize, kind, shape, dtype)
    return out


def _lora_linear(x: Tensor, inner: Tensor, up: Tensor, *frozen: Any) -> Tensor:
    wide = frozen[0] if frozen[2] is None else _dequantized(x.dtype, *frozen)
    out = inner.flatten(0, -2) @ up.t()
    out.addmm_(x.flatten(0, -2), wide.t())
    return out.view(*x.shape[:-1], len(wide))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, inner, up, weight, ctx.shape, absmax, ctx.blocksize, ctx.kind, absmax_8bit, code, offset = inputs
    ctx.save_for_backward(inner, up, weight, absmax, absmax_8bit, code, offset)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inner, up, weight, absmax, absmax_8bit, code, offset = ctx.saved_tensors
    frozen = weight, ctx.shape, absmax, ctx.blocksize, ctx.kind, absmax_8bit, code, offset
    wide = weight if absmax is None else torch.ops.finetune.dequantize(grad.dtype, *frozen)
    by_up = grad.flatten(0, -2).t() @ inner.flatten(0, -2)
    return grad @ wide, grad @ up, by_up, *[None] * len(frozen)


_library.impl("dequantize", _dequantized, "CompositeExplicitAutograd")
_library.impl("lora_linear", _lora_linear, "CompositeExplicitAutograd")
torch.library.register_fake(
    "finetune::dequantize", lambda dtype, weight, shape, *_: weight.new_empty(shape, dtype=dtype)
)
torch.library.register_fake(
    "finetune::lora_linear", lambda x, inner, up, weight, shape, *rest: x.new_empty(*x.shape[:-1], shape[0])
)
torch.library.register_autograd("finetune::lora_linear", _gradient, setup_context=_keep)
