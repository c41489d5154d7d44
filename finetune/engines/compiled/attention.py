"""Attention of rows that lie end to end, by torch.nn.attention.varlen, as an attention function of transformers: `varlen`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

import finetune.engines.compiled.shared_prefix  # noqa: F401  (its operator)

NAME = "varlen"
# torch 2.10, of the CUDA 12.8 lock, takes is_causal, and 2.11 a window that ends at the token itself
CAUSAL: dict[str, Any] = (
    dict(window_size=(-1, 0)) if "window_size" in inspect.signature(varlen_attn).parameters else dict(is_causal=True)
)


def varlen(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
    cu_seqlens: Any = None, cu_seqlens_k: Any = None, shared_prefix: tuple[torch.Tensor, ...] = (), longest: int = 0, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention within each row. query: (1, heads, tokens, head_dim); key, value: fewer heads where they are shared.

    cu_seqlens, cu_seqlens_k, shared_prefix: see `shared_prefix.Layout`, whose indices the last one holds. longest: at least the tokens
    of the longest row. The kernel reads shared heads in place, without a copy for each query head; a row's last query sees its last key.
    """
    q, k, v = (states.transpose(1, 2)[0].contiguous() for states in (query, key, value))
    if shared_prefix:
        k, v = (torch.ops.finetune.shared_prefix(states, *shared_prefix) for states in (k, v))
    out: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest, **CAUSAL)
    return out[None], None


AttentionInterface.register(NAME, varlen)
