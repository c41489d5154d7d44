"""Greedy decoding without Python between two tokens: a static key-value cache, and one captured CUDA graph for a token of all prompts.

transformers' generate launches some thousand small kernels from Python for each token, and an H100 waits for them: 17 tokens a second
of an 8B model, where this makes 133 (benchmarks/h100/decode.json). Here a prompt goes through the model in one pass, then one graph is captured and replayed.
Norms, rotary embeddings and attention are written out for the architectures in TYPES; weights are the model's own, as they lie.
Where there is room, adapter and 4-bit weights are folded into 16-bit matrices for the while, q, k and v in one, gate and up in one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

TYPES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
ROPES = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the length of the text
EVERY = 8  # tokens between two looks at what has come, each of which waits for the GPU
WARM_UP = 2  # steps before a graph is captured: they choose kernels and allocate

Product = Callable[[Tensor], Tensor]


def _base_of(model: Any) -> Any:
    """The model itself, or the one that its adapter is on."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def unserved(model: Any) -> str | None:
    """Why this model is not decoded here, in words; None: it is."""
    base = _base_of(model)
    config = base.config
    if "unsloth" in sys.modules:
        return "unsloth has changed the model's parts"
    if config.model_type not in TYPES or not type(base).__module__.startswith("transformers."):
        return f"it serves {', '.join(TYPES)} as transformers has them, and this is {config.model_type}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPES:
        return f"rotary embeddings of type {rope} depend on the length of the text"
    if getattr(config, "use_sliding_window", config.model_type == "mistral") and getattr(
        config, "sliding_window", None
    ):
        return "its attention has a sliding window"
    return None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A decoder layer's products and norms. qkv and gate_up give their parts side by side. q_norm, k_norm: of a head (Qwen3)."""

    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    norm: Product
    norm_mlp: Product
    q_norm: Product | None
    k_norm: Product | None


class Decoder:
    """Decodes greedily with the weights of `model`. folded: adapter and 4-bit weights are folded into 16-bit matrices meanwhile."""

    def __init__(self, model: Any, folded: bool):
        base = _base_of(model)
        self.base, self.decoder, self.config = base, base.model, base.config
        self.heads, self.kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self.head = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads
        self.embedding = base.get_input_embeddings().weight
        self.dtype, self.device = self.embedding.dtype, base.device
        self.scale = self.decoder.layers[0].self_attn.scaling
        self.layers = [self._layer(layer, folded) for layer in self.decoder.layers]
        self.norm = self._norm(self.decoder.norm)
        # Gemma's; rounded to the type of the states, as there
        self.factor = self.config.hidden_size**0.5 if self.config.model_type == "gemma" else None

    def _layer(self, layer: Any, folded: bool) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        joined = _folded if folded else _as_they_lie
        return Layer(
            qkv=joined([attention.q_proj, attention.k_proj, attention.v_proj], self.dtype),
            out=joined([attention.o_proj], self.dtype),
            gate_up=joined([mlp.gate_proj, mlp.up_proj], self.dtype),
            down=joined([mlp.down_proj], self.dtype),
            norm=self._norm(layer.input_layernorm),
            norm_mlp=self._norm(layer.post_attention_layernorm),
            q_norm=self._norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            k_norm=self._norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        )

    def _norm(self, norm: Any) -> Product:
        """A root mean square norm in one kernel, where transformers' takes eight."""
        gemma = self.config.model_type == "gemma"
        weight = norm.weight + 1 if gemma else norm.weight
        eps = norm.eps if gemma else norm.variance_epsilon
        return lambda x: functional.rms_norm(x, weight.shape, weight, eps)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def tokens(
        self, prompts: Sequence[Sequence[int]], limit: int, ends: Sequence[int], beside: bool = False
    ) -> Iterator[list[list[int]]]:
        """What each prompt is continued with, in lists of a few tokens as they come: at most `limit`, each to its own end token, included.

        Prompts of different lengths are filled up in front. beside: another thread uses the GPU meanwhile, and must come in between.
        """
        rows, longest = len(prompts), max(map(len, prompts))
        length = longest + limit
        pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=self.device)
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        state = _State(self, rows, length, pads)
        following = self._pass(ids, state, torch.arange(longest, device=self.device))
        stops = torch.tensor(sorted(ends), device=self.device)
        made = torch.empty(rows, limit, dtype=torch.long, device=self.device)
        made[:, 0] = following
        at, current = torch.tensor([longest], device=self.device), following[:, None].clone()

        def step() -> None:
            """One token of each row, written behind the last."""
            found = self._pass(current, state, at)
            current.copy_(found[:, None])
            at.add_(1)
            made.index_copy_(1, at - longest, found[:, None])

        told, finished = 0, torch.zeros(rows, dtype=torch.bool, device=self.device)
        with _replayed(step, (at, current), self.device, limit, beside) as again:
            for count in range(1, limit + 1):
                if count < limit and count % EVERY:
                    again()
                    continue
                new = made[:, told:count]
                ended = torch.isin(new, stops)
                kept = (ended.cumsum(1) - ended.long() == 0) & ~finished[:, None]  # up to the first end
                yield [row[: int(number)] for row, number in zip(new.tolist(), kept.sum(1).tolist(), strict=True)]
                finished |= ended.any(1)
                told = count
                if count == limit or bool(finished.all()):
                    return
                again()

    def _pass(self, ids: Tensor, state: _State, at: Tensor) -> Tensor:
        """The likeliest token after each row. ids: (rows, new) at the places `at`, (new,), of the cache."""
        hidden = functional.embedding(ids, self.embedding)
        if self.factor is not None:
            hidden = hidden * torch.tensor(self.factor, dtype=hidden.dtype, device=hidden.device)
        now = state.now(at)
        for layer, keys, values in zip(self.layers, state.keys, state.values, strict=True):
            hidden = hidden + layer.out(self._attention(layer, layer.norm(hidden), keys, values, now))
            gate, up = layer.gate_up(layer.norm_mlp(hidden)).chunk(2, -1)
            hidden = hidden + layer.down(self._act(gate) * up)
        return self.base.lm_head(self.norm(hidden[:, -1])).argmax(-1)

    def _act(self, gate: Tensor) -> Tensor:
        act: Tensor = self.decoder.layers[0].mlp.act_fn(gate)
        return act

    def _attention(self, layer: Layer, x: Tensor, keys: Tensor, values: Tensor, now: _Now) -> Tensor:
        """x: (rows, new, width). keys, values: (rows, kv heads, length, head), written at the places of the new tokens."""
        rows, new, _ = x.shape
        both = layer.qkv(x).view(rows, new, -1, self.head)
        turned, v = both.split([self.heads + self.kv_heads, self.kv_heads], 2)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = turned.split([self.heads, self.kv_heads], 2)
            turned = torch.cat([layer.q_norm(q), layer.k_norm(k)], 2)
        # the halves of a head change places, and the sine has the sign of where they come from
        turned = torch.addcmul(turned * now.cos, turned.roll(self.head // 2, -1), now.sin)
        q, k = turned.split([self.heads, self.kv_heads], 2)
        keys.index_copy_(2, now.at, k.transpose(1, 2))
        values.index_copy_(2, now.at, v.transpose(1, 2))
        seen, groups = now.bias.shape[-1], self.heads // self.kv_heads
        # the heads that share keys, and the new tokens, side by side: one product for both
        asked = q.reshape(rows, new, self.kv_heads, groups, self.head).permute(0, 2, 3, 1, 4)
        bias = now.bias[:, None, None].expand(rows, self.kv_heads, groups, new, seen)
        scores = torch.baddbmm(
            bias.reshape(rows * self.kv_heads, groups * new, seen), asked.reshape(rows * self.kv_heads, -1, self.head),
            keys[:, :, :seen].flatten(0, 1).transpose(1, 2), alpha=self.scale,
        )  # fmt: skip
        shares = functional.softmax(scores, -1)  # which computes in float32
        mixed = torch.bmm(shares, values[:, :, :seen].flatten(0, 1))
        return mixed.view(rows, self.kv_heads, groups, new, self.head).permute(0, 3, 1, 2, 4).flatten(2)


@dataclasses.dataclass(frozen=True)
class _Now:
    """For new tokens: their places `at` (new,), their angles (rows, new, 1, head), and what is added to scores (rows, new, seen)."""

    at: Tensor
    cos: Tensor
    sin: Tensor
    bias: Tensor


class _State:
    """The cache of all layers, and the angles of each row's places. pads: (rows,) places in front that only fill up."""

    def __init__(self, decoder: Decoder, rows: int, length: int, pads: Tensor):
        shape = rows, decoder.kv_heads, length, decoder.head
        make = dict(dtype=decoder.dtype, device=decoder.device)
        self.keys = [torch.zeros(shape, **make) for _ in decoder.layers]
        self.values = [torch.zeros(shape, **make) for _ in decoder.layers]
        self.pads, self.places = pads, torch.arange(length, device=decoder.device)
        positions = (self.places[None] - pads[:, None]).clamp(min=0)
        cos, sin = decoder.decoder.rotary_emb(torch.empty(0, **make), positions)
        first, second = sin.chunk(2, -1)
        self.cos, self.sin = cos[:, :, None], torch.cat([-first, second], -1)[:, :, None]

    def now(self, at: Tensor) -> _Now:
        """What new tokens need at the places `at`. Of several, as of a prompt, none sees beyond the last."""
        places = self.places if len(at) == 1 else self.places[: len(at)]
        hidden = (places[None, None] > at[None, :, None]) | (places[None, None] < self.pads[:, None, None])
        # not -inf: a place that only fills up sees nothing, and would make of nothing a number that is none
        bias = torch.zeros(hidden.shape, dtype=self.cos.dtype, device=at.device)
        return _Now(at, self.cos[:, at], self.sin[:, at], bias.masked_fill(hidden, torch.finfo(bias.dtype).min / 2))


def _folded(modules: list[Any], dtype: torch.dtype) -> Product:
    """The modules' products side by side, as one matrix with their adapters in it."""
    weight = torch.cat([_whole_weight(module, dtype) for module in modules])
    biases = [getattr(module, "base_layer", module).bias for module in modules]
    bias = None if biases[0] is None else torch.cat([b.to(dtype) for b in biases])
    return lambda x: functional.linear(x, weight, bias)


def _as_they_lie(modules: list[Any], dtype: torch.dtype) -> Product:
    """The same by the modules themselves."""
    if len(modules) == 1:
        return modules[0]
    return lambda x: torch.cat([module(x) for module in modules], -1)


@torch.no_grad()  # type: ignore[untyped-decorator]
def _whole_weight(module: Any, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight (out, in) in `dtype`, dequantized, with its adapter added and rounded once."""
    import bitsandbytes

    base = getattr(module, "base_layer", module)
    state = getattr(base.weight, "quant_state", None)
    weight = base.weight if state is None else bitsandbytes.functional.dequantize_4bit(base.weight.data, state)
    if module is base:
        return weight.to(dtype)
    total = weight.float()
    for name in module.active_adapters:
        total = torch.addmm(
            total, module.lora_B[name].weight.float(), module.lora_A[name].weight.float(), alpha=module.scaling[name]
        )
    return total.to(dtype)


def folded_bytes(model: Any) -> int:
    """Bytes that `folded` takes on top of the model's own weights."""
    base = _base_of(model)
    linear = (
        m
        for layer in base.model.layers
        for m in layer.modules()
        if hasattr(m, "in_features") and not hasattr(m, "lora_A")
    )
    width = base.get_input_embeddings().weight.element_size()
    return sum(m.in_features * m.out_features * width for m in linear)


def cache_bytes(model: Any, prompts: Sequence[Sequence[int]], limit: int) -> int:
    """Bytes of the keys and values of all prompts and of `limit` new tokens each."""
    base = _base_of(model)
    config, width = base.config, base.get_input_embeddings().weight.element_size()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    places = len(prompts) * (max(map(len, prompts)) + limit)
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head * places * width)


@contextlib.contextmanager
def _replayed(
    step: Callable[[], None], changed: Sequence[Tensor], device: torch.device, limit: int, beside: bool
) -> Iterator[Callable[[], None]]:  # fmt: skip
    """A function that does what `step` does: on a GPU as one captured graph. changed: what it changes, set back after the warm-up.

    beside: each launch waits until the one before has ended. Where launches were queued, a merge in another thread stood still for all
    of the 13 s (benchmarks/h100/answers.json), most likely because a launch that waits in the driver keeps its lock.
    """
    if device.type != "cuda" or limit < 2 * WARM_UP:
        yield step
        return
    before = [tensor.clone() for tensor in changed]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may be merging weights on the GPU
        step()
    for tensor, value in zip(changed, before, strict=True):
        tensor.copy_(value)

    def again() -> None:
        if beside:
            torch.cuda.current_stream().synchronize()
        graph.replay()

    yield again
    graph.reset()
