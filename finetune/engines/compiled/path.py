"""The compiled training path: no padding, variable-length attention, compiled decoder layers, a loss without full logits.

The same mathematics as transformers + peft in bfloat16, in a form that keeps a GPU busy. The rows of a micro-batch lie end
to end in one row of tokens; `ends` says where each stops, and attention sees no further (torch.nn.attention.varlen,
through transformers' attention registry). Each decoder layer runs under torch.compile with a symbolic number of tokens, so
that it is compiled once. What all rows begin with is computed once (`finetune.engines.compiled.shared_prefix`). What is not here (rotary embeddings,
norms, the layers' own code) is transformers'.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune import engines
from finetune.data import IGNORE_INDEX
from finetune.engines.compiled import lora_linear as adapted
from finetune.engines.compiled import shared_prefix as beginning
from finetune.files import sha256

if TYPE_CHECKING:
    from peft import PeftModel

LOSS_CHUNK = 512  # tokens whose logits exist at a time: 0.12 GiB in bfloat16 at 128,256 words
FEWEST_SHARED = 32  # tokens: below that, copying keys and values takes the time that is saved
# torch 2.10, of the CUDA 12.8 lock, takes is_causal, and 2.11 a window that ends at the token itself
CAUSAL: dict[str, Any] = (
    dict(window_size=(-1, 0)) if "window_size" in inspect.signature(varlen_attn).parameters else dict(is_causal=True)
)


# The gradients of these operators stand in the compiled graphs that torch keeps from earlier runs.
torch.compiler.config.cache_key_tag = "".join(sha256(Path(str(module.__file__))) for module in (adapted, beginning))


@contextlib.contextmanager
def applied(
    model: PeftModel, places: int, longest: int, device: str = "cuda", common: int = 0
) -> Iterator[Packed]:  # fmt: skip
    """`model` on this path for a while; generation works before and after, not in between.

    places: rows that a micro-batch may have. longest: tokens of the longest. common: tokens and labels that all rows begin with.
    On a CPU nothing is compiled.
    """
    ALL_ATTENTION_FUNCTIONS.register("varlen", varlen)
    decoder: Any = model.get_base_model().model
    attentions = [layer.self_attn for layer in decoder.layers]
    if odd := {a.scaling for a in attentions if a.scaling != a.head_dim**-0.5}:
        raise NotImplementedError(
            f"attention scaled by {odd}; torch 2.10's kernel has the usual head_dim ** -0.5 alone"
        )
    before = model.config._attn_implementation
    linear = _linear(model)
    model.config._attn_implementation = "varlen"
    for module in linear:
        module.forward = types.MethodType(adapted.forward, module)
    for module in decoder.modules():
        if hasattr(module, "compute_type_is_set"):  # of a 4-bit layer without adapter
            module.compute_type_is_set = True  # else set in the first call, and each layer is compiled twice
    rotary = decoder.rotary_emb.register_forward_hook(
        lambda module, inputs, output: tuple(_any_length(states, 1) for states in output)
    )
    if device != "cpu":
        for layer in decoder.layers:
            layer.compile(options={"shape_padding": False})  # its padding is chosen by timing, anew in every process
    try:
        yield Packed(places, longest, device, _shared(model, places, common))
        decoder.embed_tokens.to(device)  # not after an error: it may be that it does not fit
    finally:
        model.config._attn_implementation = before
        rotary.remove()
        for module in linear:
            adapted.dequantize(module, False)
            del module.forward
        for layer in decoder.layers:
            layer._compiled_call_impl = None


def _linear(model: PeftModel) -> list[Any]:
    base: Any = model.get_base_model()
    return [module for module in base.model.modules() if hasattr(module, "lora_A")]


def _shared(model: PeftModel, places: int, common: int) -> int:
    """Tokens that are computed once: all common ones but the last, which is followed by another token in each row.

    None with dropout, which draws for each row anew, and none where that gains nothing.
    """
    return common - 1 if places > 1 and common > FEWEST_SHARED and not engines.drops(model) else 0


def varlen(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
    ends: Any = None, key_ends: Any = None, spread: tuple[torch.Tensor, ...] = (), longest: int = 0, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention within each row. query: (1, heads, tokens, head_dim); key, value: fewer heads where they are shared.

    ends, key_ends, spread: see `beginning.layout`; longest: at least the tokens of the longest row. The kernel reads shared
    heads in place, without a copy for each query head; a row's last query sees its last key.
    """
    q, k, v = (states.transpose(1, 2)[0].contiguous() for states in (query, key, value))
    if spread:
        k, v = (torch.ops.finetune.spread(states, *spread) for states in (k, v))
    out: Any = varlen_attn(q, k, v, ends, key_ends, longest, longest, **CAUSAL)
    return out[None], None


def _any_length(states: torch.Tensor, *dimensions: int) -> torch.Tensor:
    """Tell the compiler that the size of these dimensions changes, so that it compiles once and not twice."""
    for dimension in dimensions:
        torch._dynamo.maybe_mark_dynamic(states, dimension)
    return states


@dataclasses.dataclass(frozen=True)
class Packed:
    """How a micro-batch is made and computed. places, longest: bounds on its rows and on their tokens.

    shared: tokens that all rows begin with and that are computed once.
    """

    places: int
    longest: int
    device: str
    shared: int = 0

    def pack(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Lay rows end to end, with their common beginning once before them. ids and positions: (1, tokens); labels: (tokens,).

        weights: (tokens,), how often a token counts as a label. 0: it is none, or nothing before it may predict it. The first that
        follows the beginning is predicted once, for all rows.
        """
        sizes, shared = [len(row["input_ids"]) for row in rows], self.shared
        parts = [(0, 0, shared), *((row, shared, size) for row, size in enumerate(sizes))]
        ids, labels = (
            np.concatenate([np.array(rows[row][column][start:end], np.int64) for row, start, end in parts])
            for column in ("input_ids", "labels")
        )
        positions = np.concatenate([np.arange(start, end) for _, start, end in parts])
        where = beginning.layout(sizes, shared, self.places)
        starts_of_others = where.ends[2 : len(rows) + 1]
        weights = (labels != IGNORE_INDEX).astype(np.int64)
        weights[: shared + 1] *= len(rows)
        weights[[0, *starts_of_others]] = 0
        used = where if shared else where[:2]
        flat, ends, key_ends, *spread = (
            torch.from_numpy(array).to(self.device) for array in (np.stack([positions, labels, weights]), *used)
        )
        return dict(
            input_ids=torch.from_numpy(ids)[None], position_ids=_any_length(flat[0:1], 1), labels=flat[1], weights=flat[2],
            ends=ends, key_ends=key_ends, longest=self.longest,
            spread=tuple(_any_length(index, *range(index.dim())) for index in spread),
        )  # fmt: skip

    def loss(self, model: PeftModel, packed: dict[str, Any], count: torch.Tensor) -> torch.Tensor:
        """Summed cross entropy of the packed tokens, divided by `count`: the labels of the whole update."""
        base: Any = model.get_base_model()
        batch = dict(packed)
        labels, weights, embedding = batch.pop("labels"), batch.pop("weights"), base.model.embed_tokens
        inputs = embedding(batch.pop("input_ids").to(embedding.weight.device)).to(self.device)
        # The first layer's input needs no gradient; where it claims one, the first layer is compiled like all others.
        batch["inputs_embeds"] = _any_length(inputs.requires_grad_(), 1)
        hidden = base.model(**batch, attention_mask=None, use_cache=False).last_hidden_state
        total: torch.Tensor = CrossEntropy.apply(hidden[0, :-1], base.lm_head.weight, labels[1:], weights[1:])
        return total / count

    @staticmethod
    def movable(model: PeftModel) -> int:
        """Bytes on the GPU that `place_embedding` frees: none where the last layer uses the same weights."""
        base: Any = model.get_base_model()
        weight: torch.Tensor = base.model.embed_tokens.weight
        return 0 if weight is base.lm_head.weight else weight.nbytes

    def place_embedding(self, model: PeftModel, on_host: bool) -> None:
        """Keep the input embedding in the host's memory until `applied` ends; only a micro-batch's rows come over. Or not."""
        base: Any = model.get_base_model()
        base.model.embed_tokens.to("cpu" if on_host else self.device)

    @staticmethod
    def dequantized_bytes(model: PeftModel) -> int:
        """Bytes on the GPU that `dequantize` takes: none where there are no 4-bit weights."""
        states = (getattr(module.base_layer.weight, "quant_state", None) for module in _linear(model))
        return sum(2 * math.prod(state.shape) for state in states if state is not None)

    @staticmethod
    def dequantize(model: PeftModel, on: bool) -> bool:
        """Keep the 4-bit weights in 16 bits too until `applied` ends, so that no update turns one into the other; or not.

        Returns whether they are kept so. Where the memory does not hold them they are not.
        """
        try:
            for module in _linear(model):
                adapted.dequantize(module, on)
        except torch.OutOfMemoryError:
            return Packed.dequantize(model, False)
        return on


class CrossEntropy(torch.autograd.Function):
    """Cross entropy of hidden (tokens, width) against labels (tokens,), summed as often as `counted` (tokens,) says.

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
        for start in range(0, len(hidden), LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            losses, slope = step(hidden[part] @ weight.t(), labels[part], counted[part])
            total += losses.sum()
            torch.mm(slope, weight, out=gradient[part])
            del slope  # or it stays until there is the next: 0.12 GiB
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
