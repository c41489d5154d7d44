"""The compiled training path: no padding, variable-length attention, compiled decoder layers, a loss without full logits.

The same mathematics as transformers + peft in bfloat16, in a form that keeps a GPU busy. The rows of a micro-batch lie end
to end in one row of tokens; `ends` says where each stops, and attention sees no further (torch.nn.attention.varlen,
through transformers' attention registry). Each decoder layer runs under torch.compile with a symbolic number of tokens, so
that it is compiled once. What is not here (rotary embeddings, norms, the layers' own code) is transformers'.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import types
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune.data import IGNORED
from finetune.engines import adapted

if TYPE_CHECKING:
    from peft import PeftModel

LOSS_CHUNK = 512  # tokens whose logits exist at a time: 0.12 GiB in bfloat16 at 128,256 words
# torch 2.10, of the CUDA 12.8 lock, takes is_causal, and 2.11 a window that ends at the token itself
CAUSAL: dict[str, Any] = (
    dict(window_size=(-1, 0)) if "window_size" in inspect.signature(varlen_attn).parameters else dict(is_causal=True)
)


@contextlib.contextmanager
def applied(model: PeftModel, places: int, longest: int, device: str = "cuda") -> Iterator[Packed]:
    """`model` on this path for a while; generation works before and after, not in between.

    places: rows that a micro-batch may have. longest: tokens of the longest. On a CPU nothing is compiled.
    """
    ALL_ATTENTION_FUNCTIONS.register("varlen", varlen)
    decoder: Any = model.get_base_model().model
    attentions = [layer.self_attn for layer in decoder.layers]
    if odd := {a.scaling for a in attentions if a.scaling != a.head_dim**-0.5}:
        raise NotImplementedError(
            f"attention scaled by {odd}; torch 2.10's kernel has the usual head_dim ** -0.5 alone"
        )
    before = model.config._attn_implementation
    linear = [module for module in decoder.modules() if hasattr(module, "lora_A")]
    model.config._attn_implementation = "varlen"
    for module in linear:
        module.forward = types.MethodType(adapted.forward, module)
    for module in decoder.modules():
        if hasattr(module, "compute_type_is_set"):  # of a 4-bit layer without adapter
            module.compute_type_is_set = True  # else set in the first call, and each layer is compiled twice
    rotary = decoder.rotary_emb.register_forward_hook(lambda module, inputs, output: tuple(map(_any_length, output)))
    if device != "cpu":
        for layer in decoder.layers:
            layer.compile(options={"shape_padding": False})  # its padding is chosen by timing, anew in every process
    try:
        yield Packed(places, longest, device)
        decoder.embed_tokens.to(device)  # not after an error: it may be that it does not fit
    finally:
        model.config._attn_implementation = before
        rotary.remove()
        for module in linear:
            del module.forward
        for layer in decoder.layers:
            layer._compiled_call_impl = None


def varlen(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
    ends: Any = None, longest: int = 0, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention within each row. query: (1, heads, tokens, head_dim); key, value: fewer heads where they are shared.

    ends: int32 (rows + 1,), where each row ends; longest: at least the tokens of the longest. The kernel reads shared keys
    and values in place, without a copy for each query head.
    """
    q, k, v = (states.transpose(1, 2)[0].contiguous() for states in (query, key, value))
    out: Any = varlen_attn(q, k, v, ends, ends, longest, longest, **CAUSAL)
    return out[None], None


def _any_length(states: torch.Tensor) -> torch.Tensor:
    """Tell the compiler that the number of tokens (dimension 1) changes, so that it compiles once and not twice."""
    torch._dynamo.maybe_mark_dynamic(states, 1)
    return states


@dataclasses.dataclass(frozen=True)
class Packed:
    """How a micro-batch is made and computed. places, longest: bounds on its rows and on their tokens."""

    places: int
    longest: int
    device: str

    def pack(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Lay rows end to end: tensors of shape (1, tokens), and `ends` of shape (places + 1,), which never changes.

        A row's first label is left out of the loss: nothing before it may predict it.
        """
        ids = [token for row in rows for token in row["input_ids"]]
        positions = [position for row in rows for position in range(len(row["input_ids"]))]
        labels = [label if position else IGNORED for row in rows for position, label in enumerate(row["labels"])]
        ends = list(itertools.accumulate((len(row["input_ids"]) for row in rows), initial=0))
        ends += [ends[-1]] * (self.places + 1 - len(ends))
        flat = torch.tensor([positions, labels]).to(self.device)
        return dict(
            input_ids=torch.tensor([ids]), position_ids=flat[0:1], labels=flat[1:2], longest=self.longest,
            ends=torch.tensor(ends, dtype=torch.int32).to(self.device),
        )  # fmt: skip

    def loss(self, model: PeftModel, packed: dict[str, Any], count: torch.Tensor) -> torch.Tensor:
        """Summed cross entropy of the packed tokens, divided by `count`: the labels of the whole update."""
        base: Any = model.get_base_model()
        batch = dict(packed)
        labels, embedding = batch.pop("labels"), base.model.embed_tokens
        _any_length(batch["position_ids"])
        inputs = embedding(batch.pop("input_ids").to(embedding.weight.device)).to(self.device)
        # The first layer's input needs no gradient; where it claims one, the first layer is compiled like all others.
        batch["inputs_embeds"] = _any_length(inputs.requires_grad_())
        hidden = base.model(**batch, attention_mask=None, use_cache=False).last_hidden_state
        total: torch.Tensor = CrossEntropy.apply(hidden[0, :-1], base.lm_head.weight, labels[0, 1:])
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


class CrossEntropy(torch.autograd.Function):
    """Summed cross entropy of hidden (tokens, width) against labels (tokens,), with a frozen weight (words, width).

    The gradient is computed in the forward pass, chunk by chunk, so that no logits are kept and none computed twice.
    Nothing is added up by atomics: two runs give the same bytes.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        step = _compiled_step if hidden.is_cuda else _step
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            losses, slope = step(hidden[part] @ weight.t(), labels[part])
            total += losses.sum()
            torch.mm(slope, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[0].to(gradient.dtype), None, None


def _step(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each token (tokens,) and its gradient by the logits (tokens, words), computed in float32."""
    wide, counted, target = logits.float(), labels != IGNORED, labels.clamp(min=0)[:, None]
    norm = wide.logsumexp(-1, keepdim=True)
    losses = (norm - wide.gather(1, target))[:, 0] * counted
    hit = torch.arange(wide.shape[1], device=wide.device)[None] == target
    slope = ((wide - norm).exp() - hit.float()) * counted[:, None]
    return losses, slope.to(logits.dtype)


_compiled_step = torch.compile(_step, dynamic=True)
