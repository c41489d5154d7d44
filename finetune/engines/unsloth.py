"""unsloth on a CUDA GPU, called as the tutorial calls it. The only file that imports unsloth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from finetune import engines
from finetune.errors import MachineError
from finetune.settings import Settings
from finetune.sources.model import Source

if TYPE_CHECKING:
    from peft import PeftModel


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


def load(settings: Settings, source: Source) -> PeftModel:
    """Load the base and attach the adapter, with the tutorial's arguments.

    `source.folder` is a folder, so no name is mapped to a quantised mirror of other weights.
    """
    from unsloth import FastLanguageModel

    engines.check_causal(source)
    with engines.loading(source, "unsloth cannot; try ENGINE=transformers"):
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(source.folder),
            max_seq_length=settings.max_seq_length,
            dtype=engines.compute_dtype(settings),
            load_in_4bit=settings.load_in_4bit,
            trust_remote_code=False,
        )
    engines.settle_4bit(settings, model)
    import torch

    prefix = engines.outside_text(model)
    modules = [(name, module) for name, module in model.named_modules() if name.startswith(prefix)]
    linear = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
    engines.check_targets(settings, linear)
    engines.tell_outside(prefix)
    adapted: PeftModel = FastLanguageModel.get_peft_model(
        model,
        r=settings.lora_r,
        target_modules=engines.targets(settings.target_modules, linear, prefix),  # it leaves an expression as it is
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias=settings.lora_bias,
        use_gradient_checkpointing={"unsloth": "unsloth", "true": True, "false": False}[
            settings.gradient_checkpointing
        ],
        random_state=settings.seed,
        use_rslora=settings.use_rslora,
        loftq_config=None,
    )
    return engines.begin_adapter(adapted, settings.seed)


@contextlib.contextmanager
def answering(model: PeftModel) -> Iterator[None]:
    """unsloth's own generation, and back."""
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    try:
        yield
    finally:
        FastLanguageModel.for_training(model)


def path(
    model: PeftModel, choice: engines.Choice, places: int, longest: int, common: int
) -> AbstractContextManager[None]:
    """unsloth has patched the model already."""
    return contextlib.nullcontext()


def layers(model: PeftModel) -> int:
    """Decoder layers."""
    return int(model.config.get_text_config().num_hidden_layers)


def recompute(model: PeftModel, arguments: Any, count: int) -> None:
    """Recompute the activations of all layers, or of none. unsloth's trainer asks model and argument again when it begins."""
    from unsloth import FastLanguageModel

    mode: str | bool = "unsloth" if count else False
    arguments.gradient_checkpointing = bool(count)
    model._unsloth_gradient_checkpointing = mode
    FastLanguageModel.for_training(model, use_gradient_checkpointing=mode)
