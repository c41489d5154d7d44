"""Which tensor of the base belongs to which module of the model that transformers makes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from finetune.errors import SettingsError
from finetune.sources.model import Source
from finetune.weights.shards import Base


class Layout:
    """Which tensor of the base is which part of the model, as transformers finds it.

    transposed: modules that store (in, out).

    Names in the files often differ from those in the model, and names alone mislead: the same last part is in layers of
    the language model, of towers for pictures and sound, and of those that predict further tokens (MTP), which are not
    loaded.
    """

    def __init__(self, base: Base, modules: Collection[str]):
        """modules: of the adapter. Of the classes that can load the base, the one with most of these modules is taken."""
        self.base, best, found = base, -1, dict[str, Any]()
        for model in _models(base.folder):
            inside = dict(model.named_modules())
            if (count := len(inside.keys() & set(modules))) > best:
                best, found = count, inside
            if count == len(modules):
                break
        if not found:
            raise SettingsError(
                f"MODEL_NAME={base.folder}: is of a type that transformers cannot build, so the merge cannot find "
                "its weights; set SAVE_MERGED=0"
            )
        self.transposed = {name for name, module in found.items() if isinstance(module, Conv1D)}
        self.names = _loaded_as(found[""], base.shapes)

    def tensor(self, module: str, part: str, shape: tuple[int, ...]) -> str:
        """The base's tensor for a module's weight or bias. Raises SettingsError where it has none of this shape."""
        name = self.names.get(f"{module}.{part}", "")
        if self.base.shapes.get(name) == shape:
            return name
        raise SettingsError(
            f"{self.base.folder.name}: the weights of {module} are stored in another form than the model uses, so "
            "the merge cannot find them; leave it out of TARGET_MODULES, or set SAVE_MERGED=0"
        )


def _models(folder: Path) -> Iterator[Any]:
    """The model without its weights, in each class that takes it: the transformers engine's first, then unsloth's."""
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        model = None
        with torch.device("meta"), contextlib.suppress(ValueError):  # of a kind that it does not know
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = kind.from_config(config, trust_remote_code=False)
        if model is not None:
            yield model


def _loaded_as(model: Any, names: Collection[str]) -> dict[str, str]:
    """Name in the model -> the tensor that is loaded there unchanged; "" if it is made of several.

    In the order of convert_and_load_state_dict_in_model: sorted, all renamings, then one conversion; the first tensor
    counts.
    """
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    prefix, inside = model.base_model_prefix, model.state_dict()
    found: dict[str, str] = {}
    for name in sorted(names, key=dot_natural_key):
        here, converted = rename_source_key(name, renamings, converters, prefix, inside)
        if here not in inside and name in inside:
            here, converted = rename_source_key(name, [], [], prefix, inside)
        if here in inside:
            found.setdefault(here, "" if converted else name)
    return found


def check_mergeable(model: PeftModel, source: Source) -> None:
    """Before training: every adapted module has its tensor in the base.

    Raises SettingsError that names those without.
    """
    adapted = {key: module for key, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    layout = Layout(Base(source.folder), adapted)
    found, lost = set(), set()
    for key, module in adapted.items():
        shape = (module.out_features, module.in_features)
        name = key.removesuffix(".base_layer").rpartition(".")[2]
        try:
            layout.tensor(key, "weight", shape[::-1] if key in layout.transposed else shape)
            if not isinstance(module, ParamWrapper):  # which no name in TARGET_MODULES makes
                found.add(name)
        except SettingsError:
            lost.add(name)
    if lost:
        rest = ",".join(sorted(found - lost))
        raise SettingsError(
            f"TARGET_MODULES: {source.name} stores the weights of {', '.join(sorted(lost))} in another form than the "
            "model uses, so the merge cannot find them; leave them "
            f"out{rest and f', for example TARGET_MODULES={rest}'}, or set SAVE_MERGED=0"
        )
