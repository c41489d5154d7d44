"""A fresh adapter: its first numbers, and the way to take it off again."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer


def begin(model: PeftModel, seed: int) -> PeftModel:
    """Draw the adapter's A matrices anew as PEFT does (uniform, Kaiming), from `seed` alone; B is zero already.

    PEFT draws them on the device of the weights, in the order in which it meets them. So the same SEED would start with other
    numbers on another device or in the other engine, and such runs could not be compared.
    """
    generator = torch.Generator().manual_seed(seed)
    for _, weight in sorted((name, p) for name, p in model.named_parameters() if "lora_A" in name):
        drawn = torch.empty(weight.shape, dtype=torch.float32)
        torch.nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
        weight.data.copy_(drawn)
    return model


def take_off(model: Any) -> None:
    """Remove all adapters, also those of an attempt that failed half-way."""
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(module, BaseTunerLayer) and last != "base_layer":  # an adapter inside another goes with it
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    vars(model).pop("peft_config", None)
    model.requires_grad_(False)
