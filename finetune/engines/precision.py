"""The types that a model computes in, and its weights in 4 bits."""

from __future__ import annotations

import bitsandbytes
import torch
from transformers import BitsAndBytesConfig

from finetune import patches
from finetune.errors import SettingsError
from finetune.settings import Settings


def compute_dtype(settings: Settings) -> torch.dtype:
    """The type of activations: DTYPE, or bfloat16 where the GPU has it, else float16; float32 on a CPU."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    if not torch.cuda.is_available():
        return torch.float32  # bfloat16 is emulated there, many times slower
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NormalFloat weights with double quantisation, computing in `dtype`, as QLoRA and the tutorial have them."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def settle_4bit(settings: Settings, model: torch.nn.Module) -> None:
    """Raise SettingsError if NF4 was asked for and the weights are not NF4. Then keep their layout."""
    quantised = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    for module in quantised:
        patches.keep_4bit_layout(module)
    kinds = {m.weight.quant_type for m in quantised}
    if settings.load_in_4bit and kinds != {"nf4"}:
        raise SettingsError(
            f"LOAD_IN_4BIT=1: {settings.model_name} was not loaded in NF4 (found {', '.join(kinds) or 'no 4-bit layer'}); "
            "use another model, or LOAD_IN_4BIT=0 for 16-bit weights"
        )
    stacked = (p for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3)
    left = sum(p.nbytes for p in stacked if p.is_floating_point())
    if settings.load_in_4bit and left:
        print(
            f"LOAD_IN_4BIT=1: the model's experts stay as they are, {left / 1e9:.1f} GB; only linear layers are packed",
            flush=True,
        )
