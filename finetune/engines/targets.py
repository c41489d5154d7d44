"""TARGET_MODULES: which layers PEFT adapts, and which names to suggest when one cannot be adapted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from finetune.errors import SettingsError
from finetune.settings import Settings

if TYPE_CHECKING:
    import torch


def last_names(linear: list[str]) -> list[str]:
    """What TARGET_MODULES may name of these layers: the last part of each name, once, without the head."""
    return sorted({name.rpartition(".")[2] for name in linear} - {"lm_head"})


def outside_text(model: torch.nn.Module) -> str:
    """The prefix of the text decoder in a model that also takes pictures or sound, for example "model.language_model."; else "".

    Rows are text, so parts outside the decoder get no gradient from them.
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

    linear: names of all. usable: keeps the last names that can be adapted; it is called only to write the message.
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
    """The end of a message on TARGET_MODULES. usable: names that can be adapted; if that is `every` name, all-linear works too."""
    if not usable:
        return "none of its linear layers can be adapted; take another model"
    whole = " or TARGET_MODULES=all-linear" if usable == every else ""
    return f"its linear layers that can be adapted are {', '.join(usable)}, for example TARGET_MODULES={','.join(usable)}{whole}"
