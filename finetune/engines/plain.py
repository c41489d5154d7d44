"""transformers + peft + bitsandbytes: every CPU, and a CUDA GPU where asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from finetune import patches
from finetune.engines import refusals, targets
from finetune.engines.compiled import served
from finetune.errors import SettingsError, first_line
from finetune.settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel

    from finetune.engines.compiled.path import Packed
    from finetune.sources.model import Source


PARTIAL = True
KEEPS_INPUTS = True
# The lock does not install the last two, but transformers would import them if they were there.
UNUSED = ("torchao", "torchvision", "wandb", "httpx._main", "sklearn", "scipy")


def prepare(settings: Settings) -> None:
    """Set up torch's allocator, keep out what nothing here uses, and import the rest.

    Segments may grow: micro-batches of changing lengths would leave holes (78 GiB held for 42 used).
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    patches.keep_out(name for name in UNUSED if name != settings.report_to)
    patches.list_packages_once()
    from trl import SFTTrainer  # noqa: F401  (and with it torch, transformers and peft)


def load(settings: Settings, source: Source) -> PeftModel:
    """See `engine.Engine`. A model type that the compiled path does not serve is first tested with a few tokens."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    from finetune.engines import adapter, checks, passes, precision

    checks.check_causal(source)
    dtype = precision.compute_dtype(settings)
    options: dict[str, Any] = dict(quantization_config=precision.nf4(dtype)) if settings.load_in_4bit else {}
    with refusals.loading(source):
        model, info = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=dtype, device_map={"": 0 if torch.cuda.is_available() else "cpu"}, output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=False, **options,
        )  # fmt: skip
    checks.check_whole(source, info)
    precision.settle_4bit(settings, model)
    model.requires_grad_(False)
    known = model.config.model_type in served.TYPES  # all that follows is known to work with these
    if not known:
        remedy = "take another model"
        with refusals.loading(source, f"try LOAD_IN_4BIT=0, or {remedy}" if settings.load_in_4bit else remedy):
            causal = passes.is_causal(model, dtype)
        if not causal:
            raise refusals.not_causal(source)
    head, prefix = model.get_output_embeddings(), targets.outside_text(model)
    linear = [
        name
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    ]
    targets.tell_outside(prefix)

    def adapt(names: Sequence[str], rank: int) -> PeftModel:
        config = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
            bias=settings.lora_bias, target_modules=targets.targets(names, linear, prefix), use_rslora=settings.use_rslora,
        )  # fmt: skip
        return get_peft_model(model, config)

    def usable(names: list[str]) -> list[str]:
        """Those of the names that get a gradient when they are adapted alone."""
        found = []
        for name in names:
            with contextlib.suppress(Exception):
                if not passes.without_gradient(adapt([name], 1), [name], dtype):
                    found.append(name)
            adapter.take_off(model)
        return found

    targets.check_targets(settings, linear, usable)
    named = [] if settings.target_modules == ("all-linear",) else settings.target_modules
    try:
        adapted = adapt(settings.target_modules, settings.lora_r)
        idle = [] if known else passes.without_gradient(adapted, named, dtype)
        wrong = f"{', '.join(idle)} would not be trained, because the model does not use it" if idle else ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # layers that PEFT refuses, or that return something it does not expect
        wrong = first_line(error)
    if wrong:
        adapter.take_off(model)
        raise SettingsError(
            f"TARGET_MODULES={','.join(settings.target_modules)}: {settings.model_name} cannot get an adapter on these layers ({wrong}); "
            f"{targets.advice(usable(targets.last_names(linear)))}"
        )
    return adapter.begin(adapted, settings.seed)


@contextlib.contextmanager
def answering(model: PeftModel) -> Iterator[None]:
    """Evaluation mode for a while."""
    model.eval()
    try:
        yield
    finally:
        model.train()


def path(
    model: PeftModel, compiled: bool, max_rows: int, longest: int, shared: int
) -> AbstractContextManager[Packed | None]:
    """The compiled path where it was chosen; else nothing changes."""
    if not compiled:
        return contextlib.nullcontext()
    from finetune.engines.compiled.path import applied

    return applied(model, max_rows, longest, shared=shared)


def layers(model: PeftModel) -> int:
    """Decoder layers, as transformers marks them."""
    return len(_layers(model))


def recompute(model: PeftModel, count: int) -> None:
    """Recompute the first layers, not the last: the backward pass needs the activations of the last layers first."""
    from finetune.engines import passes

    base = model.get_base_model()
    base.gradient_checkpointing_disable()
    if count:
        base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": passes.drops(model)})
        for index, layer in enumerate(_layers(model)):
            layer.gradient_checkpointing = index < count


def checkpointing(count: int) -> bool:
    """Never: transformers' trainer would switch it on for all layers."""
    return False


def _layers(model: PeftModel) -> list[Any]:
    """The layers that can be recomputed; none if the architecture does not support it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    base: Any = model.get_base_model()
    if not base.supports_gradient_checkpointing:
        return []
    prefix = targets.outside_text(base)
    return [
        m for name, m in base.named_modules() if name.startswith(prefix) and isinstance(m, GradientCheckpointingLayer)
    ]
