"""What a model does, tested with a few tokens before training. These passes do not change the random numbers of training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft import PeftModel

COMMON = 8  # tokens that two rows have in common, each with 4 others after them


def is_causal(model: Any, dtype: torch.dtype) -> bool:
    """Whether later tokens leave earlier predictions unchanged. Raises the model's own error if it cannot run like this.

    The logits need not be equal bit for bit, because other tokens put experts into other groups. If they differ, the gradient decides:
    in a causal model, the gradient of a prediction with respect to a later token is exactly zero, in every type.
    """
    with _pass(model, dtype):
        with torch.no_grad():
            model.train()  # in which Gemma 3n clamps weights: not in 4 bits
            model(**_tokens(model), use_cache=False)
            model.eval()
            rows = [model(**_tokens(model, end), use_cache=False).logits[:, :COMMON] for end in (0, 1)]
        if torch.equal(*rows):
            return True
        kept: list[torch.Tensor] = []

        def keep(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[-1] * 1  # what follows may change it in place

        handle = model.get_input_embeddings().register_forward_hook(keep)
        try:
            logits = model(**_tokens(model), use_cache=False).logits[:, :COMMON]
        finally:
            handle.remove()
        (slope,) = torch.autograd.grad(logits.float().square().sum(), kept[:1])
        return not bool((slope[:, COMMON:].abs() > 0).any())


def without_gradient(model: PeftModel, names: Sequence[str], dtype: torch.dtype) -> list[str]:
    """The `names` whose adapter gets no gradient. Raises the model's own error if it cannot run with them."""
    with _pass(model, dtype):
        model.train()
        logits = model(**_tokens(model), use_cache=False).logits
        logits.float().square().sum().backward()
    reached = {
        name.partition(".lora_B.")[0]
        for name, weight in model.named_parameters()
        if ".lora_B." in name and weight.grad is not None and weight.grad.count_nonzero()
    }
    model.zero_grad(set_to_none=True)
    return [name for name in names if not any(f".{part}".endswith(f".{name}") for part in reached)]


@contextlib.contextmanager
def _pass(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Around a pass like those of training. It does not change their random numbers, and leaves the model in training mode."""
    cuda = torch.cuda.is_available()
    lower = torch.autocast("cuda", dtype, enabled=cuda and dtype is not torch.float32)
    try:
        with torch.random.fork_rng(devices=[0] if cuda else []), lower:
            yield
    finally:
        model.train()


def _tokens(model: Any, end: int = 0) -> dict[str, torch.Tensor]:
    """A row of 12 tokens from the middle of the vocabulary, because its first may be special. end: which 4 tokens come last."""
    words: Any = model.get_input_embeddings()
    first = words.num_embeddings // 2
    ids = [*range(first, first + COMMON), *range(first - 4 * end, first - 4 * end + 4)]
    row = torch.tensor([ids], device=model.device) % words.num_embeddings
    return dict(input_ids=row, attention_mask=torch.ones_like(row))


def drops(model: torch.nn.Module) -> bool:
    """Whether training uses dropout: LORA_DROPOUT, or the base's own. For attention that is a number in most models."""
    return any(True for _ in _dropping(model))


@contextlib.contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Nothing drops for a while, and all else stays as in training: compiled layers and recomputing depend on the mode of a module."""
    silenced = [module for module in _dropping(model) if module.training]
    for module in silenced:
        module.training = False
    try:
        yield
    finally:
        for module in silenced:
            module.training = True


def _dropping(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for module in model.modules():
        share = module.p if type(module).__name__ == "Dropout" else getattr(module, "attention_dropout", 0)
        if isinstance(share, (int, float)) and share > 0:
            yield module
