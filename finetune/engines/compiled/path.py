"""The compiled training path: no padding, variable-length attention, compiled decoder layers, a loss without full logits.

The same mathematics as transformers + peft in bfloat16, in a form that keeps a GPU busy. The rows of a micro-batch lie end to end in
one row of tokens; `cu_seqlens` says where each stops, and attention sees no further. Each decoder layer runs under torch.compile with
a symbolic number of tokens, so that it is compiled once. The prefix that every row shares is computed once (`shared_prefix`). The rest
(rotary embeddings, norms, the layers' own code) is transformers'.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finetune import patches
from finetune.data import IGNORE_INDEX
from finetune.engines import passes
from finetune.engines.compiled import attention, lora_linear, shared_prefix
from finetune.engines.compiled.cross_entropy import CrossEntropy
from finetune.engines.token_losses import token_losses
from finetune.files import sha256

if TYPE_CHECKING:
    from peft import PeftModel

FEWEST_SHARED = 32  # tokens: below that, copying keys and values takes the time that is saved

# The gradients of these operators stand in the compiled graphs that torch keeps from earlier runs.
torch.compiler.config.cache_key_tag = "".join(
    sha256(Path(str(module.__file__))) for module in (lora_linear, shared_prefix)
)


@contextlib.contextmanager
def applied(
    model: PeftModel, max_rows: int, longest: int, device: str = "cuda", shared: int = 0
) -> Iterator[Packed]:  # fmt: skip
    """`model` on this path for a while; generation works before and after, not in between. On a CPU nothing is compiled.

    max_rows: the most rows of a micro-batch. longest: tokens of the longest. shared: length of the prefix, with its labels, that all rows share.
    """
    base: Any = model.get_base_model()
    decoder = base.model
    if odd := {a.scaling for a in (layer.self_attn for layer in decoder.layers) if a.scaling != a.head_dim**-0.5}:
        raise NotImplementedError(
            f"attention scaled by {odd}; torch 2.10's kernel has the usual head_dim ** -0.5 alone"
        )
    made = Packed(model, max_rows, longest, device, _computed_once(model, max_rows, shared))
    with contextlib.ExitStack() as undo:
        undo.callback(base.set_attn_implementation, model.config._attn_implementation)
        base.set_attn_implementation(attention.NAME)
        undo.enter_context(patches.forwards_replaced(made._lora_layers(), lora_linear.forward))
        undo.callback(made._keep, dequantized=False)
        sized = decoder.rotary_emb.register_forward_hook(
            lambda module, inputs, output: tuple(_any_length(states, 1) for states in output)
        )
        undo.callback(sized.remove)
        if device != "cpu":  # inductor's padding is chosen by timing, anew in every process
            undo.enter_context(patches.compiled(decoder.layers, options={"shape_padding": False}))
        yield made
        decoder.embed_tokens.to(device)  # not after an error: it may not fit


def _computed_once(model: PeftModel, max_rows: int, shared: int) -> int:
    """Tokens of the prefix that are computed once: all but the last, because the token after it differs from row to row.

    None with dropout, which differs from row to row, and none where that gains nothing.
    """
    return shared - 1 if max_rows > 1 and shared > FEWEST_SHARED and not passes.drops(model) else 0


def _any_length(states: torch.Tensor, *dimensions: int) -> torch.Tensor:
    """Tell the compiler that the size of these dimensions changes, so that it compiles once and not twice."""
    for dimension in dimensions:
        torch._dynamo.maybe_mark_dynamic(states, dimension)
    return states


def _at_least(row: dict[str, list[int]], tokens: int) -> dict[str, list[int]]:
    """The row, filled up behind its end with tokens that no loss is on, which change nothing before them."""
    lacking = max(0, tokens - len(row["input_ids"]))
    return dict(
        input_ids=row["input_ids"] + row["input_ids"][-1:] * lacking, labels=row["labels"] + [IGNORE_INDEX] * lacking
    )


@dataclasses.dataclass
class Packed:
    """How a micro-batch of `model` is made and computed. max_rows, longest: bounds on its rows and on their tokens.

    shared: length of the shared prefix that is computed once.
    """

    model: PeftModel
    max_rows: int
    longest: int
    device: str
    shared: int = 0
    pads = False  # no row is filled up

    def pack(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Lay rows end to end, with their shared prefix once before them. ids and positions: (1, tokens); labels: (tokens,).

        weights: (tokens,), how often a token counts as a label. 0: it is no label, or no token before it may predict it. The
        first token after the shared prefix is the same in all rows: it is predicted once and counts for all.
        """
        sizes, shared = [len(row["input_ids"]) for row in rows], self.shared
        parts = [(0, 0, shared), *((row, shared, size) for row, size in enumerate(sizes))]
        ids, labels = (
            np.concatenate([np.array(rows[row][column][start:end], np.int64) for row, start, end in parts])
            for column in ("input_ids", "labels")
        )
        positions = np.concatenate([np.arange(start, end) for _, start, end in parts])
        layout = shared_prefix.layout(sizes, shared, self.max_rows)
        starts_of_others = layout.cu_seqlens[2 : len(rows) + 1]
        weights = (labels != IGNORE_INDEX).astype(np.int64)
        weights[: shared + 1] *= len(rows)
        weights[[0, *starts_of_others]] = 0
        used = layout if shared else layout[:2]
        flat, cu_seqlens, cu_seqlens_k, *index = (
            torch.from_numpy(array).to(self.device) for array in (np.stack([positions, labels, weights]), *used)
        )
        return dict(
            input_ids=torch.from_numpy(ids)[None], position_ids=_any_length(flat[0:1], 1), labels=flat[1], weights=flat[2],
            cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, longest=self.longest,
            shared_prefix=tuple(_any_length(part, *range(part.dim())) for part in index),
        )  # fmt: skip

    def loss(self, rows: Sequence[dict[str, list[int]]], count: torch.Tensor) -> torch.Tensor:
        """Summed cross entropy of these rows, at most `max_rows`, divided by `count`: the labels of the whole update. With its graph."""
        base: Any = self.model.get_base_model()
        batch = self.pack(rows)
        labels, weights = batch.pop("labels"), batch.pop("weights")
        hidden = self._states(batch)
        total: torch.Tensor = CrossEntropy.apply(hidden[0, :-1], base.lm_head.weight, labels[1:], weights[1:])
        return total / count

    def losses(self, rows: Sequence[dict[str, list[int]]]) -> list[float]:
        """Summed cross entropy of each row, to measure. The rows begin with the same `shared` + 1 tokens and labels: see `beginning`.

        The pass is that of training, with its gradients switched on and never taken: without them, or in evaluation mode, each
        layer would be compiled a second time, which takes longer than the measurement.
        """
        base: Any = self.model.get_base_model()
        rows = [_at_least(row, self.shared + 2) for row in rows]
        batch = self.pack(rows)
        labels, weights = batch.pop("labels"), batch.pop("weights")
        with passes.without_dropout(self.model):
            hidden = self._states(batch)[0, :-1].detach()  # from here on its activations are gone
        each = (token_losses(hidden, labels[1:], base.lm_head.weight) * (weights[1:] > 0)).double().cpu().numpy()
        ends = np.cumsum([self.shared, *(len(row["input_ids"]) - self.shared for row in rows)])
        common = each[
            : self.shared
        ].sum()  # of all tokens that are the same in every row: `each` begins with the second one's
        return [float(common + each[a : b - 1].sum()) for a, b in itertools.pairwise(ends)]

    def beginning(self, row: dict[str, list[int]]) -> tuple[int, ...]:
        """What rows of one micro-batch have to have in common."""
        same = self.shared + 1 if self.shared else 0
        return (*row["input_ids"][:same], *row["labels"][:same])

    def _states(self, batch: dict[str, Any]) -> torch.Tensor:
        """The last hidden states (1, tokens, width) of what `pack` made, without labels and weights. With their graph."""
        base: Any = self.model.get_base_model()
        embedding = base.model.embed_tokens
        inputs = embedding(batch.pop("input_ids").to(embedding.weight.device)).to(self.device)
        # The first layer's input needs no gradient; where it claims one, the first layer is compiled like all others.
        batch["inputs_embeds"] = _any_length(inputs.requires_grad_(), 1)
        hidden: torch.Tensor = base.model(**batch, attention_mask=None, use_cache=False).last_hidden_state
        return hidden

    def movable(self) -> int:
        """Bytes on the GPU that `place_embedding` frees: none where the last layer uses the same weights."""
        base: Any = self.model.get_base_model()
        weight: torch.Tensor = base.model.embed_tokens.weight
        return 0 if weight is base.lm_head.weight else weight.nbytes

    def place_embedding(self, on_host: bool) -> None:
        """Keep the input embedding in the host's memory, from where only a micro-batch's rows come over; or on the GPU."""
        base: Any = self.model.get_base_model()
        base.model.embed_tokens.to("cpu" if on_host else self.device)

    def dequantized_bytes(self) -> int:
        """Bytes on the GPU that `dequantize` takes: none where there are no 4-bit weights."""
        states = (getattr(layer.base_layer.weight, "quant_state", None) for layer in self._lora_layers())
        return sum(2 * math.prod(state.shape) for state in states if state is not None)

    def dequantize(self, on: bool) -> bool:
        """Keep 16-bit copies of the 4-bit weights, so that updates need not convert them; or drop the copies.

        Returns whether there are copies now: none if the memory cannot hold them.
        """
        try:
            self._keep(dequantized=on)
        except torch.OutOfMemoryError:
            self._keep(dequantized=False)
            return False
        return on

    def _keep(self, dequantized: bool) -> None:
        for layer in self._lora_layers():
            lora_linear.dequantize(layer, dequantized)

    def _lora_layers(self) -> list[Any]:
        base: Any = self.model.get_base_model()
        return [module for module in base.model.modules() if hasattr(module, "lora_A")]
