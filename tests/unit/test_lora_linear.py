"""The operator of a frozen weight and its adapter: peft's mathematics, one rounding, and what torch asks of an operator."""

from __future__ import annotations

import types
from typing import Any

import bitsandbytes
import pytest
import torch

from finetune.engines.compiled import lora_linear

KINDS = {"plain": None, "nf4": False, "nf4, double": True}


def layer(kind: str, device: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    """A PEFT linear layer (256 -> 192, rank 8) over a frozen one of this kind, with an adapter that does something."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    nested = KINDS[kind]
    base: Any = torch.nn.Linear(256, 192, bias=bias).to(dtype)
    if nested is not None:
        plain, options = base, dict(quant_type="nf4", compress_statistics=nested)
        base = bitsandbytes.nn.Linear4bit(256, 192, bias=bias, compute_dtype=dtype, **options)
        base.load_state_dict(plain.state_dict())
        base.weight = bitsandbytes.nn.Params4bit(plain.weight.data, requires_grad=False, **options)
        base = base.to(dtype) if bias else base
    model = get_peft_model(torch.nn.Sequential(base).to(device), LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    found: Any = model.get_base_model()[0]
    torch.nn.init.normal_(found.lora_B["default"].weight, std=0.1)
    return found.float() if dtype is torch.float32 else found


def computed(module: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients of input and adapter."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x)
    (out * torch.arange(192, device=x.device)).sum().backward()
    return [out.detach(), x.grad, module.lora_A["default"].weight.grad, module.lora_B["default"].weight.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_output_and_gradients_are_peft_s(kind: str, device: str, compiled: bool) -> None:
    module, x = layer(kind, device), torch.randn(2, 7, 256, device=device)
    expected = computed(module, x)
    module.forward = types.MethodType(lora_linear.forward, module)
    backend = "inductor" if device == "cuda" else "aot_eager"  # the same graphs, without a C++ compiler
    found = computed(torch.compile(module, backend=backend) if compiled else module, x)
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


def test_a_young_adapter_comes_through_as_well_as_with_peft(device: str) -> None:
    """On a CPU all of it does; cuBLAS may round the product before it adds (benchmarks/adapter_rounding.py), as peft does everywhere."""
    module, x = layer("plain", device, torch.bfloat16, bias=False), torch.randn(64, 256, device=device)
    module.lora_B["default"].weight.data.mul_(1e-3)
    with torch.no_grad():
        exact = module.float()(x)
        down, up = (module.lora_A["default"].weight, module.lora_B["default"].weight)
        share = 2 * (x @ down.t()) @ up.t()
        module = module.bfloat16()
        low = x.bfloat16()
        rounded, base = module(low).float(), module.base_layer(low).float()
        found = lora_linear.forward(module, low).float()
    mine, pefts = (abs(float(((out - base) * share).sum() / (share * share).sum()) - 1) for out in (found, rounded))
    assert mine < 0.3 < pefts if device == "cpu" else mine < pefts + 0.05
    assert float((found - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_an_operator_as_torch_wants_it(kind: str, device: str) -> None:
    module = layer(kind, device)
    x, inner, up = (
        torch.randn(*shape, device=device, requires_grad=True) for shape in ((3, 7, 256), (3, 7, 8), (192, 8))
    )
    parts = lora_linear._parts(module.base_layer.weight)
    torch.library.opcheck(torch.ops.finetune.lora_linear.default, (x, inner, up, *parts))
    if kind != "plain":
        torch.library.opcheck(torch.ops.finetune.dequantize.default, (torch.bfloat16, *parts))
