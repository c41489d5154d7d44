"""transformers + peft + bitsandbytes: every CPU, and a CUDA GPU where asked for."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finetune import engines
from finetune.errors import SettingsError, first_line
from finetune.hub import Source
from finetune.settings import Settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from finetune.engines.compiled import Packed


PARTIAL = True
KEEPS_INPUTS = True
# A sixth of the modules, and of the time they take; the last two are no part of the lock, but transformers would import them.
UNUSED = ("torchao", "torchvision", "wandb", "httpx._main", "sklearn", "scipy")


def prepare(settings: Settings) -> None:
    """Set up torch's allocator, and keep out what transformers and trl would import and nothing here uses.

    Segments may grow: micro-batches of changing lengths would leave holes (78 GiB held for 42 used).
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    for name in UNUSED:
        if name != settings.report_to:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # None: not to be found


def load(settings: Settings, source: Source) -> PeftModel:
    """Load the base, frozen, and attach a fresh adapter in float32.

    Raises SettingsError for an unknown architecture, TARGET_MODULES that fit nothing, or 4 bits that cannot be had.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = engines.compute_dtype(settings)
    options: dict[str, Any] = dict(quantization_config=engines.nf4(dtype)) if settings.load_in_4bit else {}
    with engines.loading(source):
        model, info = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=dtype, device_map={"": 0 if torch.cuda.is_available() else "cpu"}, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    engines.check_whole(source, info)
    engines.settle_4bit(settings, model)
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if _linear(module) and module is not head]
    engines.check_targets(settings, linear)
    model.requires_grad_(False)
    targets: Any = list(settings.target_modules) if settings.target_modules != ("all-linear",) else "all-linear"
    config = LoraConfig(
        task_type="CAUSAL_LM", r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        bias=settings.lora_bias, target_modules=targets, use_rslora=settings.use_rslora,
    )  # fmt: skip
    try:
        adapted: PeftModel = get_peft_model(model, config)
    except ValueError as error:  # some layers it knows to be of no use, or only together
        raise SettingsError(
            f"TARGET_MODULES={','.join(settings.target_modules)}: {settings.model_name} cannot be adapted so "
            f"({first_line(error)}); name other ones of its linear layers, which are {','.join(engines.last_names(linear))}"
        ) from None
    if model.config.model_type not in engines.COMPILED_TYPES:  # with which all of it is known to go together
        _try(adapted, dtype, source)
    return engines.begin_adapter(adapted, settings.seed)


def _try(model: PeftModel, dtype: torch.dtype, source: Source) -> None:
    """A few tokens through the model. Only that tells of some architectures that they cannot be had in 4 bits, or with an adapter there."""
    import torch

    ids = torch.ones(1, 8, dtype=torch.long, device=model.device)
    remedy = "try LOAD_IN_4BIT=0 or fewer TARGET_MODULES, or take another model"
    lower = torch.autocast("cuda", dtype, enabled=torch.cuda.is_available() and dtype is not torch.float32)
    model.eval()
    with engines.loading(source, remedy), torch.no_grad(), lower:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    model.train()


def _linear(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


@contextlib.contextmanager
def answering(model: PeftModel) -> Iterator[None]:
    """Evaluation mode for a while."""
    model.eval()
    try:
        yield
    finally:
        model.train()


@contextlib.contextmanager
def path(model: PeftModel, choice: engines.Choice, places: int, longest: int, common: int) -> Iterator[Packed | None]:
    """The compiled path where it was chosen; else nothing changes."""
    if not choice.compiled:
        yield None
        return
    from finetune.engines import compiled

    with compiled.applied(model, places, longest, common=common) as packed:
        yield packed


def layers(model: PeftModel) -> int:
    """Decoder layers, as transformers marks them."""
    return len(_layers(model))


def recompute(model: PeftModel, arguments: Any, count: int) -> None:
    """Recompute the activations of the first `count` layers in the backward pass: those of the last are needed first."""
    arguments.gradient_checkpointing = False  # the trainer would switch it on for all layers
    base = model.get_base_model()
    base.gradient_checkpointing_disable()
    if count:
        base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": engines.drops(model)})
        for index, layer in enumerate(_layers(model)):
            layer.gradient_checkpointing = index < count


def _layers(model: PeftModel) -> list[Any]:
    """Those that can be recomputed: none where the architecture says that it cannot."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not model.get_base_model().supports_gradient_checkpointing:
        return []
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
