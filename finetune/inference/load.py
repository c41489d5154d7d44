"""A trained model, loaded to answer: an adapter on its base, or merged weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune import data
from finetune.engines import precision, refusals
from finetune.errors import OutputError, SettingsError
from finetune.settings import Settings
from finetune.sources.model import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load(folder: Path, base: Source | None, settings: Settings) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer.

    folder: an adapter's where there is a base, which is held in 4 bits where LOAD_IN_4BIT says so; else merged weights'.

    Raises SettingsError where the base cannot be loaded, OutputError where `folder` cannot, MachineError where the GPU's memory
    does not hold the weights.
    """
    settings = settings.replaced(load_in_4bit=settings.load_in_4bit and base is not None)
    with refusals.loading(base) if base else _loading_output(folder):
        dtype = precision.compute_dtype(settings)
        four_bits = dict(quantization_config=precision.nf4(dtype)) if settings.load_in_4bit else {}
        model: Any = AutoModelForCausalLM.from_pretrained(
            base.folder if base else folder,
            dtype=dtype,
            device_map={"": 0 if torch.cuda.is_available() else "cpu"},
            trust_remote_code=False,
            **four_bits,
        )
    precision.settle_4bit(settings, model)
    with _loading_output(folder):
        if base:
            model = PeftModel.from_pretrained(model, folder)
        tokenizer = data.tokenizer(Source(str(folder), None, folder))
    return model.eval(), tokenizer


@contextlib.contextmanager
def _loading_output(folder: Path) -> Iterator[None]:
    """What a run wrote and a library refuses, as OutputError."""
    source = Source(str(folder), None, folder)
    try:
        with refusals.loading(source, "verify says which of its files is damaged", "OUTPUT_DIR"):
            yield
    except SettingsError as error:
        raise OutputError(*error.problems) from None
