"""unsloth on a CUDA GPU, called as the tutorial calls it. The only file that imports unsloth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from finetune import patches
from finetune.engines import refusals, targets
from finetune.errors import MachineError
from finetune.settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel

    from finetune.sources.model import Source


PARTIAL = False
KEEPS_INPUTS = False  # its checkpointing moves them to the host's memory


def prepare(settings: Settings) -> None:
    """Import unsloth before trl and transformers, which it patches (unsloth #2797). Raises MachineError where it cannot start."""
    try:
        import unsloth  # noqa: F401
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise MachineError(
            f"ENGINE=unsloth: unsloth does not start here ({error}). Check that `nvidia-smi` and torch see the GPU, or set "
            "ENGINE=transformers."
        ) from None
    from trl import SFTTrainer  # noqa: F401  (the one that unsloth has patched)


def load(settings: Settings, source: Source) -> PeftModel:
    """Load the base and attach the adapter, with the tutorial's arguments.

    It gets a folder, not a name: unsloth maps some names to a quantised mirror with other weights.
    """
    import torch
    from unsloth import FastLanguageModel

    from finetune.engines import adapter, checks, precision

    checks.check_causal(source)
    with refusals.loading(source, "unsloth cannot; try ENGINE=transformers"):
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(source.folder),
            max_seq_length=settings.max_seq_length,
            dtype=precision.compute_dtype(settings),
            load_in_4bit=settings.load_in_4bit,
            trust_remote_code=False,
        )
    precision.settle_4bit(settings, model)
    prefix = targets.outside_text(model)
    modules = [(name, module) for name, module in model.named_modules() if name.startswith(prefix)]
    linear = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
    targets.check_targets(settings, linear)
    targets.tell_outside(prefix)
    adapted: PeftModel = FastLanguageModel.get_peft_model(
        model,
        r=settings.lora_r,
        target_modules=targets.targets(settings.target_modules, linear, prefix),  # it leaves an expression as it is
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias=settings.lora_bias,
        use_gradient_checkpointing={"true": True, "false": False}.get(settings.gradient_checkpointing, "unsloth"),
        random_state=settings.seed,
        use_rslora=settings.use_rslora,
        loftq_config=None,
    )
    return adapter.begin(adapted, settings.seed)


@contextlib.contextmanager
def answering(model: PeftModel) -> Iterator[None]:
    """unsloth's own generation, and back."""
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    try:
        yield
    finally:
        FastLanguageModel.for_training(model)


def path(model: PeftModel, compiled: bool, max_rows: int, longest: int, shared: int) -> AbstractContextManager[None]:
    """unsloth has patched the model already."""
    return contextlib.nullcontext()


def layers(model: PeftModel) -> int:
    """Decoder layers."""
    return int(model.config.get_text_config().num_hidden_layers)


def recompute(model: PeftModel, count: int) -> None:
    """Recompute the activations of all layers, or of none."""
    from unsloth import FastLanguageModel

    mode: str | bool = "unsloth" if count else False
    patches.remember_checkpointing(model, mode)
    FastLanguageModel.for_training(model, use_gradient_checkpointing=mode)


def checkpointing(count: int) -> bool:
    """Whether any layer is recomputed: unsloth's trainer reads this argument too when it begins."""
    return bool(count)
