"""transformers + peft + bitsandbytes: every CPU, and a CUDA GPU where asked for."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from finetune import engines
from finetune.errors import SettingsError, first_line
from finetune.settings import Settings
from finetune.sources.model import Source

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from finetune.engines.compiled.path import Packed


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

    engines.check_causal(source)
    dtype = engines.compute_dtype(settings)
    options: dict[str, Any] = dict(quantization_config=engines.nf4(dtype)) if settings.load_in_4bit else {}
    with engines.loading(source):
        model, info = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=dtype, device_map={"": 0 if torch.cuda.is_available() else "cpu"}, output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=False, **options,
        )  # fmt: skip
    engines.check_whole(source, info)
    engines.settle_4bit(settings, model)
    model.requires_grad_(False)
    known = model.config.model_type in engines.COMPILED_TYPES  # with which all that follows is known to go together
    if not known:
        remedy = "take another model"
        with engines.loading(source, f"try LOAD_IN_4BIT=0, or {remedy}" if settings.load_in_4bit else remedy):
            causal = _is_causal(model, dtype)
        if not causal:
            raise engines.not_causal(source)
    head, prefix = model.get_output_embeddings(), engines.outside_text(model)
    modules = [(name, module) for name, module in model.named_modules() if name.startswith(prefix)]
    linear = [name for name, module in modules if _linear(module) and module is not head]
    engines.tell_outside(prefix)

    def adapt(names: Sequence[str], rank: int) -> PeftModel:
        config = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
            bias=settings.lora_bias, target_modules=engines.targets(names, linear, prefix), use_rslora=settings.use_rslora,
        )  # fmt: skip
        return get_peft_model(model, config)

    def usable(names: list[str]) -> list[str]:
        """Those of the names that get a gradient when they are adapted alone."""
        found = []
        for name in names:
            with contextlib.suppress(Exception):
                if not _without_gradient(adapt([name], 1), [name], dtype):
                    found.append(name)
            _bare(model)
        return found

    engines.check_targets(settings, linear, usable)
    named = [] if settings.target_modules == ("all-linear",) else settings.target_modules
    try:
        adapted = adapt(settings.target_modules, settings.lora_r)
        idle = [] if known else _without_gradient(adapted, named, dtype)
        wrong = f"{', '.join(idle)} would not be trained, since the model passes it by" if idle else ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # layers that PEFT knows to be of no use, or that return what it does not expect
        wrong = first_line(error)
    if wrong:
        _bare(model)
        raise SettingsError(
            f"TARGET_MODULES={','.join(settings.target_modules)}: {settings.model_name} cannot be adapted so ({wrong}); "
            f"{engines.advice(usable(engines.last_names(linear)))}"
        )
    return engines.begin_adapter(adapted, settings.seed)


BEGINNING = 8  # tokens that two rows have in common, each with 4 others after them


def _is_causal(model: Any, dtype: torch.dtype) -> bool:
    """Whether other tokens leave what is predicted before them as it was. Raises what a model raises that cannot be computed so.

    The logits need not be the same to the bit: experts are computed in other groups then. So where they differ, the gradient is
    asked: of a prediction by a later token it is exactly zero in a causal model, in every type.
    """
    import torch

    with _pass(model, dtype):
        with torch.no_grad():
            model.train()  # in which Gemma 3n clamps weights: not in 4 bits
            model(**_tokens(model), use_cache=False)
            model.eval()
            rows = [model(**_tokens(model, end), use_cache=False).logits[:, :BEGINNING] for end in (0, 1)]
        if torch.equal(*rows):
            return True
        kept: list[torch.Tensor] = []

        def keep(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[-1] * 1  # what follows may change it in place

        handle = model.get_input_embeddings().register_forward_hook(keep)
        try:
            logits = model(**_tokens(model), use_cache=False).logits[:, :BEGINNING]
        finally:
            handle.remove()
        (slope,) = torch.autograd.grad(logits.float().square().sum(), kept[:1])
        return not bool((slope[:, BEGINNING:].abs() > 0).any())


def _without_gradient(model: PeftModel, names: Sequence[str], dtype: torch.dtype) -> list[str]:
    """Those of `names` of which no adapter gets a gradient. Raises what a model raises that cannot be computed with them."""
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
    """For a pass as training makes it, which draws nothing that training would draw; the model is left in training mode."""
    import torch

    cuda = torch.cuda.is_available()
    lower = torch.autocast("cuda", dtype, enabled=cuda and dtype is not torch.float32)
    try:
        with torch.random.fork_rng(devices=[0] if cuda else []), lower:
            yield
    finally:
        model.train()


def _tokens(model: Any, end: int = 0) -> dict[str, torch.Tensor]:
    """A row of 12 tokens from the middle of the vocabulary: the first may be special. end: which last 4."""
    import torch

    words: Any = model.get_input_embeddings()
    first = words.num_embeddings // 2
    ids = [*range(first, first + BEGINNING), *range(first - 4 * end, first - 4 * end + 4)]
    row = torch.tensor([ids], device=model.device) % words.num_embeddings
    return dict(input_ids=row, attention_mask=torch.ones_like(row))


def _bare(model: Any) -> None:
    """Take all adapters off, also those of an attempt that ended half-way."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(module, BaseTunerLayer) and last != "base_layer":  # one in another goes with it
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    vars(model).pop("peft_config", None)
    model.requires_grad_(False)


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
    from finetune.engines.compiled import path as compiled

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

    base: Any = model.get_base_model()
    if not base.supports_gradient_checkpointing:
        return []
    prefix = engines.outside_text(base)
    return [
        m for name, m in base.named_modules() if name.startswith(prefix) and isinstance(m, GradientCheckpointingLayer)
    ]
