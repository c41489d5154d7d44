"""Which models, GPUs and settings the compiled path serves. Light: nothing here imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.settings import Settings

if TYPE_CHECKING:
    from finetune.machine.gpus import Gpu

# Their decoder layers take position_embeddings, and hand everything else to the attention function.
TYPES = ("llama", "qwen2", "qwen3")


def why_not(settings: Settings, gpu: Gpu | None, config: dict[str, Any]) -> str | None:
    """Why the compiled path cannot serve, in words; None: it can. config: the model's config.json."""
    kind = config.get("model_type")
    if gpu is None:
        return "no GPU"
    if not settings.torch_compile:
        return "TORCH_COMPILE=0"
    if gpu.capability < (8, 0):
        return f"{gpu.name} has compute capability {'.'.join(map(str, gpu.capability))}, it needs 8.0"
    if kind not in TYPES or config.get("use_sliding_window"):
        return f"it serves {', '.join(TYPES)} with full attention, and this is {kind}"
    width = _head_width(config)
    if width % 8 or width > 256:  # 100 in open_llama_3b
        return f"an attention head is {width} wide, and its kernel takes multiples of 8 up to 256"
    if config.get("attention_dropout"):
        return "the model drops out attention, which its kernel does not"
    if settings.dtype not in ("auto", "bfloat16"):
        return f"DTYPE={settings.dtype}, it computes in bfloat16"
    if settings.lora_bias != "none":
        return f"LORA_BIAS={settings.lora_bias}, it trains no biases"
    return None


def _head_width(config: dict[str, Any]) -> int:
    """Width of an attention head by config.json; 0 if that is damaged; loading the model says so."""
    head, hidden, heads = config.get("head_dim"), config.get("hidden_size", 4096), config.get("num_attention_heads", 32)
    if isinstance(head, int):
        return head
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else 0
