"""Two ways to load a model and train it, behind the same functions: `engines.unsloth` and `engines.transformers`.

Each has
  prepare(settings)                 -> None       what must happen before other libraries are imported
  load(settings, source)            -> PeftModel  base in 4 bits where asked, adapter attached, ready to train
  answering(model)                  -> context    the model set up for generation, and back for training afterwards
  path(model, choice, ...)          -> context    the model set up for training; yields the compiled path, or None
  layers(model)                     -> int        layers whose activations may be recomputed
  recompute(model, arguments, n)    -> None       recompute those of the first n
and PARTIAL: whether n may lie between none and all; KEEPS_INPUTS: whether a recomputed layer keeps its input on the GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from finetune import console
from finetune.errors import MachineError, SettingsError, first_line
from finetune.settings import Settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    from finetune.data import Tokens
    from finetune.engines.compiled.path import Packed
    from finetune.machine.gpus import Gpu
    from finetune.sources.model import Source


class Engine(Protocol):
    """What both engines offer."""

    PARTIAL: bool
    KEEPS_INPUTS: bool

    def prepare(self, settings: Settings) -> None: ...
    def load(self, settings: Settings, source: Source) -> PeftModel: ...
    def answering(self, model: PeftModel) -> AbstractContextManager[None]: ...
    def path(
        self, model: PeftModel, choice: Choice, places: int, longest: int, common: int
    ) -> AbstractContextManager[Packed | None]: ...
    def layers(self, model: PeftModel) -> int: ...
    def recompute(self, model: PeftModel, arguments: Any, count: int) -> None: ...


# Decoder layers that take position_embeddings and hand everything else to the attention function.
MODULES = {"transformers": "plain", "unsloth": "unsloth"}
COMPILED_TYPES = ("llama", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The engine's name, why it was taken, whether it trains on the compiled path, and to the same bytes each time."""

    name: str
    reason: str
    compiled: bool = False
    deterministic: bool = False

    def describe(self) -> str:
        """One line for the console."""
        return f"engine: {self.name}{', compiled' if self.compiled else ''} ({self.reason})"

    def deciding(self) -> dict[str, Any]:
        """What of it decides the trained weights."""
        return dict(engine=self.name, compiled=self.compiled, deterministic=self.deterministic)

    def open(self, settings: Settings) -> Engine:
        """Import the engine, and what must be imported before everything else, and then all that training needs."""
        console.hush()  # on a CPU with AVX512-BF16, bitsandbytes warns of a package that nothing here needs
        gc.disable()  # it would walk a million lasting objects again and again, a tenth of the time that imports take
        try:
            engine: Engine = importlib.import_module(f"finetune.engines.{MODULES[self.name]}")
            engine.prepare(settings)
            importlib.import_module("finetune.training.fit")
        finally:
            gc.freeze()
            gc.enable()
        return engine


def choose(settings: Settings, gpu: Gpu | None, config: dict[str, Any]) -> Choice:
    """ENGINE, or for auto transformers on a CPU and where the compiled path serves, else unsloth.

    The compiled path was the faster one on an H100 (benchmarks/h100); other GPUs were not measured. config: of the model, as in
    its config.json.
    """
    against = not_compiled(settings, gpu, config)
    if settings.engine == "unsloth":
        return Choice("unsloth", "ENGINE=unsloth")
    if settings.engine == "transformers":
        why = f"ENGINE=transformers{f'; not compiled: {against}' if gpu and against else ''}"
    elif gpu is None:
        why = "no GPU is visible"
    elif not against:
        why = "its compiled path is the fastest for this GPU and model"
    elif settings.full_determinism:
        why = f"FULL_DETERMINISM=1, which unsloth cannot keep; not compiled: {against}"
    else:
        return Choice("unsloth", f"a CUDA GPU, and the compiled path is out: {against}")
    cheap = gpu is None or not against  # under a tenth of the time there: benchmarks/h100
    return Choice(
        "transformers", why, not against, cheap if settings.full_determinism is None else settings.full_determinism
    )


def not_compiled(settings: Settings, gpu: Gpu | None, config: dict[str, Any]) -> str | None:
    """Why the compiled path cannot serve, in words; None: it can."""
    kind = config.get("model_type")
    if gpu is None:
        return "no GPU"
    if not settings.torch_compile:
        return "TORCH_COMPILE=0"
    if gpu.capability < (8, 0):
        return f"{gpu.name} has compute capability {'.'.join(map(str, gpu.capability))}, it needs 8.0"
    if kind not in COMPILED_TYPES or config.get("use_sliding_window"):
        return f"it serves {', '.join(COMPILED_TYPES)} with full attention, and this is {kind}"
    width = _head_width(config)
    if width % 8 or width > 256:  # 100 in open_llama_3b
        return f"an attention head is {width} wide, and its kernel takes multiples of 8 up to 256"
    if config.get("attention_dropout"):
        return "the model drops out attention, which its kernel does not"
    if settings.dtype not in ("auto", "bfloat16"):
        return f"DTYPE={settings.dtype}, it computes in bfloat16"
    if settings.lora_bias != "none":
        return f"LORA_BIAS={settings.lora_bias}, it trains no biases"
    return None


def _head_width(config: dict[str, Any]) -> int:
    """Width of an attention head by config.json; 0 where that is damaged, which who loads the model tells."""
    head, hidden, heads = config.get("head_dim"), config.get("hidden_size", 4096), config.get("num_attention_heads", 32)
    if isinstance(head, int):
        return head
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else 0


def compute_dtype(settings: Settings) -> torch.dtype:
    """The type of activations: DTYPE, or bfloat16 where the GPU has it, else float16; float32 on a CPU."""
    import torch

    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    if not torch.cuda.is_available():
        return torch.float32  # bfloat16 is emulated there, many times slower
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def last_names(linear: list[str]) -> list[str]:
    """What TARGET_MODULES may name of these layers: the last part of each name, once, without the head."""
    return sorted({name.rpartition(".")[2] for name in linear} - {"lm_head"})


def outside_text(model: torch.nn.Module) -> str:
    """The prefix of the text decoder in a model that sees or hears too, for example "model.language_model."; else "".

    Rows are text: whatever lies outside of the decoder gets no gradient from them.
    """
    config: Any = model.config
    if config.get_text_config(decoder=True) is config:
        return ""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    prefix = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    linear = (
        name for name, module in model.named_modules() if "Linear" in type(module).__name__ and module is not head
    )
    return "" if all(name.startswith(prefix) for name in linear) else prefix


def tell_outside(prefix: str) -> None:
    """One line where a model has more than its text decoder, which `outside_text` named."""
    if prefix:
        print("only the model's text decoder is adapted; its parts for pictures and sound stay as they are", flush=True)


def targets(names: Sequence[str], linear: list[str], prefix: str) -> Any:
    """What PEFT is told to adapt: `names`, and with a prefix only what lies below it, as one expression.

    linear: names of the linear layers that may be adapted.
    """
    every = tuple(names) == ("all-linear",)
    if not prefix:
        return "all-linear" if every else list(names)
    chosen = last_names(linear) if every else names
    return f"{re.escape(prefix)}(?:.*\\.)?(?:{'|'.join(map(re.escape, chosen))})"


def check_targets(
    settings: Settings, linear: list[str], usable: Callable[[list[str]], list[str]] = lambda names: names
) -> None:
    """Raise SettingsError where a name in TARGET_MODULES is no linear layer of the model.

    linear: names of all. usable: those last names of them that can be adapted; it is asked only for the sentence.
    """
    if settings.target_modules == ("all-linear",):
        return
    missing = [t for t in settings.target_modules if not any(n == t or n.endswith(f".{t}") for n in linear)]
    if missing or "lm_head" in settings.target_modules:
        wrong, every = ", ".join(missing) or "lm_head", last_names(linear)
        raise SettingsError(
            f"TARGET_MODULES={','.join(settings.target_modules)}: {settings.model_name} has no {wrong} that can be adapted; "
            f"{advice(usable(every), every)}"
        )


def advice(usable: list[str], every: list[str] | None = None) -> str:
    """The end of a sentence on TARGET_MODULES. usable: names that can be adapted; where they are `every` name, so can all-linear."""
    if not usable:
        return "none of its linear layers can be adapted; take another model"
    whole = " or TARGET_MODULES=all-linear" if usable == every else ""
    return f"its linear layers that can be adapted are {', '.join(usable)}, for example TARGET_MODULES={','.join(usable)}{whole}"


def check_causal(source: Source) -> None:
    """Raise SettingsError where config.json is that of a model that sees the tokens to come, as BERT and its like do.

    Theirs say with `is_decoder` whether they do. The field means that only in models that fill in masked words: GPT-NeoX has it
    too, and is a decoder. Any other model's may say `is_causal`, which transformers reads where it makes the mask.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    with loading(source):
        config: Any = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and hasattr(config, "is_decoder") and not config.is_encoder_decoder  # fmt: skip
    if (masked and config.is_decoder is False) or not getattr(config.get_text_config(), "is_causal", True):
        raise not_causal(source)


def not_causal(source: Source) -> SettingsError:
    """The refusal of a model in which a token's prediction depends on those that follow."""
    return SettingsError(
        f"MODEL_NAME={source.name}: is no causal language model: in it the tokens that follow change what is predicted before them, so it "
        "would learn to copy and not to write; take a model made to write text, for example unsloth/DeepSeek-R1-Distill-Llama-8B"
    )


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NormalFloat weights with double quantisation, computing in `dtype`, as QLoRA and the tutorial have them."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


@contextlib.contextmanager
def loading(
    source: Source, remedy: str = "take another model, or copy or download this one again", variable: str = "MODEL_NAME"
) -> Iterator[None]:
    """Whatever a library raises while it loads a model, as a SettingsError that names the model and the remedy.

    variable: which setting the folder comes from.

    A MachineError where the GPU's memory does not hold the weights.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"{variable}={source.name}: its weights do not fit the GPU's memory ({str(error).partition('. ')[0]}); take a smaller "
            "model, or a GPU on which nothing else runs"
        ) from None
    except Exception as error:  # a damaged file or an odd config.json may raise anything
        raise SettingsError(
            f"{variable}={source.name}: cannot be loaded as a causal language model ({first_line(error)}); {remedy}"
        ) from None


@contextlib.contextmanager
def memory_told(
    remedy: str = "plan for less, for example MAX_MEMORY=12; the same command goes on from the last checkpoint",
) -> Iterator[None]:
    """GPU memory that runs out where nothing can be halved (an answer, the optimizer, the merge), as a MachineError."""
    try:
        yield
    except RuntimeError as error:  # what torch's own is; importing torch to look would cost a refused run a second
        if type(error).__name__ != "OutOfMemoryError":
            raise
        raise MachineError(
            f"out of GPU memory ({str(error).partition('. ')[0]}). Where another program uses this GPU, end it, or {remedy}."
        ) from None


def check_whole(source: Source, info: Mapping[str, Any]) -> None:
    """Raise SettingsError where the files lack tensors of the model: transformers would go on with random ones.

    info: what transformers says of the loading (`output_loading_info`); tied weights are not in it.
    """
    lacking = sorted(info["missing_keys"])
    odd = sorted(
        f"{name} has shape {list(found)}, not {list(wanted)}" for name, found, wanted in info["mismatched_keys"]
    )
    if lacking or odd:
        shown = [*(f"{name} is missing" for name in lacking), *odd]
        more = f" and {len(shown) - 10} more" if len(shown) > 10 else ""
        raise SettingsError(
            f"MODEL_NAME={source.name}: its files are not those of the model that its config.json describes: {', '.join(shown[:10])}{more}; "
            "download or copy the model again"
        )


def check_fits(model: PeftModel, settings: Settings, tokens: Tokens) -> None:
    """Raise SettingsError where the model has no embedding for a token or for a place in the longest row, or has biases in float16."""
    import torch

    if any(p.requires_grad and p.dtype is torch.float16 and n.endswith("bias") for n, p in model.named_parameters()):
        raise SettingsError(  # which GradScaler refuses, after everything is loaded
            f"LORA_BIAS={settings.lora_bias}: {settings.model_name} computes in float16 here, in which its biases cannot be trained; "
            "set LORA_BIAS=none, or DTYPE=float32"
        )
    words: Any = model.get_input_embeddings()
    if tokens.largest >= words.num_embeddings:
        raise SettingsError(
            f"MODEL_NAME={settings.model_name}: its tokenizer makes token {tokens.largest}, and the model has {words.num_embeddings}; "
            "take the tokenizer that belongs to the model"
        )
    # where positions are not computed, or once and for all
    learned = ("wpe", "embed_positions", "position_embeddings", "positions_embed", "pos_encoding")
    embeddings = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    computed = [name for name, _ in model.named_buffers()]
    tables = [name for name in embeddings + computed if name.endswith(learned)]
    config: Any = model.config.get_text_config()
    # MPT makes its biases of places (ALiBi) for so many in each pass
    biased = config.max_seq_len if getattr(getattr(config, "attn_config", None), "alibi", False) else math.inf
    limit = config.max_position_embeddings if tables else biased
    if tokens.longest > limit:
        raise SettingsError(
            f"MAX_SEQ_LENGTH={settings.max_seq_length}: a row has {tokens.longest} tokens, and {settings.model_name} knows {limit} "
            f"positions; for example MAX_SEQ_LENGTH={limit}"
        )


def settle_4bit(settings: Settings, model: torch.nn.Module) -> None:
    """Raise SettingsError where the weights are not NF4 though asked: nobody asked for a silent 16-bit run. And keep them so.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a weight at its first use in evaluation mode and never back; the
    packed product has no gradient, so training after an answer would silently reach only the last layers.
    """
    import bitsandbytes

    quantised = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    for module in quantised:
        module.support_avx512bf16_for_cpu = False
    kinds = {m.weight.quant_type for m in quantised}
    if settings.load_in_4bit and kinds != {"nf4"}:
        raise SettingsError(
            f"LOAD_IN_4BIT=1: {settings.model_name} was not loaded in NF4 (found {', '.join(kinds) or 'no 4-bit layer'}); "
            "use another model, or LOAD_IN_4BIT=0 for 16-bit weights"
        )
    stacked = (p for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3)
    left = sum(p.nbytes for p in stacked if p.is_floating_point())
    if settings.load_in_4bit and left:
        print(
            f"LOAD_IN_4BIT=1: the model's experts stay as they are, {left / 1e9:.1f} GB; only linear layers are packed",
            flush=True,
        )


def drops(model: torch.nn.Module) -> bool:
    """Whether training draws anything: LORA_DROPOUT, or the base's own, which for attention is a number in most models."""
    shares = (m.p if type(m).__name__ == "Dropout" else getattr(m, "attention_dropout", 0) for m in model.modules())
    return any(isinstance(share, (int, float)) and share > 0 for share in shares)


def begin_adapter(model: PeftModel, seed: int) -> PeftModel:
    """Draw the adapter's A matrices anew as PEFT does (uniform, Kaiming), from `seed` alone; B is zero already.

    PEFT draws them where the weights lie, in the order in which it meets them; so the same SEED began with other numbers on
    another device or in the other engine, and no two runs could be laid side by side.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for _, weight in sorted((name, p) for name, p in model.named_parameters() if "lora_A" in name):
        drawn = torch.empty(weight.shape, dtype=torch.float32)
        torch.nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
        weight.data.copy_(drawn)
    return model
