"""All patches of other people's code. Each says why it is here, where upstream discusses it, and when it can go.

This file imports no library at its top: one of the patches has to come before all of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def keep_out(names: Iterable[str]) -> None:
    """Let later imports of these modules fail as if they were not installed.

    Why: transformers and trl import what they find, for pictures, sound and metrics. That is a sixth of all modules and of the time that
    imports take. Upstream: no setting turns an optional package off; to be filed: docs/upstream/transformers-optional-imports.md.
    Goes when transformers and trl import these packages only where they are used.
    """
    for name in names:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # None: not to be found


def list_packages_once() -> None:
    """The list of installed packages is made once in a process.

    Why: transformers and trl each make it while they are imported, from one file of each package: 0.8 s on a machine with many packages.
    Upstream: to be filed: docs/upstream/transformers-optional-imports.md. Goes when they look up only the packages that they ask for.
    """
    importlib.metadata.packages_distributions = functools.cache(importlib.metadata.packages_distributions)


@contextlib.contextmanager
def optimizer_does_not_wait(optim: str) -> Iterator[None]:
    """bitsandbytes' optimizer no longer waits for the GPU after each tensor, for a while. optim: OPTIM.

    Why: an 8B model's adapter has 448 tensors, and the waits take 40 ms of an update on an H100. On one stream only paging needs them.
    Upstream: bitsandbytes #2050 (open); the smallest case: docs/upstream/bitsandbytes-optimizer-waits.py.
    Goes when the locked version has #2050, or another mend of it.
    """
    from bitsandbytes.optim import optimizer

    before = optimizer.sync_gpu
    if not optim.startswith("paged"):
        optimizer.sync_gpu = lambda tensor: None
    try:
        yield
    finally:
        optimizer.sync_gpu = before


def keep_4bit_layout(layer: Any) -> None:
    """A bitsandbytes layer keeps its 4-bit weight as it was loaded.

    Why: on a CPU with AVX512-BF16, version 0.50 packs the weight anew at its first use in evaluation mode, and never back. The packed
    product has no gradient, so training after an answer would silently reach only the last layers.
    Upstream: to be filed: docs/upstream/bitsandbytes-cpu-packing.md, with the smallest case beside it.
    Goes when the locked version gives a gradient through the packed weight, or unpacks it for training.
    """
    layer.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def adapter_keeps_its_type(model: Any) -> Iterator[None]:
    """Afterwards the trained weights of `model` have their old values and types again. Make trl's trainer inside.

    Why: trl rounds the adapter of a quantised model to bfloat16 when the trainer is made. There, updates of 2e-4 are lost.
    Upstream: trl does it until PEFT has an option for it (peft #2889). Goes when trl leaves the adapter's type to that option.
    """
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, p in model.named_parameters():
        if name in kept:
            p.data = kept[name]


@contextlib.contextmanager
def forwards_replaced(layers: list[Any], forward: Callable[..., Any]) -> Iterator[None]:
    """These PEFT layers compute by `forward` for a while: a function of the layer and its input.

    Why: PEFT's own forward converts to float32 and back around each product. Upstream: PEFT takes layer classes of ours
    (`LoraConfig._register_custom_module`), but that is private too, is settled when the adapter is made, and would serve generation as
    well, which stays PEFT's here. Goes when PEFT lets a layer's computation be replaced and put back.
    """
    for layer in layers:
        layer.forward = types.MethodType(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextlib.contextmanager
def compiled(layers: Iterable[Any], **options: Any) -> Iterator[None]:
    """These modules run under torch.compile for a while. options: of `torch.compile`.

    Why: `Module.compile` has no way back, and generation afterwards is not to be compiled.
    Upstream: to be filed: docs/upstream/torch-module-uncompile.md. Goes when torch can undo it.
    """
    for layer in layers:
        layer.compile(**options)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def remember_checkpointing(model: Any, mode: str | bool) -> None:
    """unsloth's trainer takes `mode` for its gradient checkpointing when it begins.

    Why: the plan is made after the model, and the trainer goes back to what the model was made with.
    Upstream: unsloth #4735 added the attribute, without a function that sets it. Goes when `FastLanguageModel.for_training` keeps what
    it was told.
    """
    model._unsloth_gradient_checkpointing = mode
