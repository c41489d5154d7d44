"""A base whose weights are quantised: it is refused, and the refusal guesses the name of its 16-bit original."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from finetune.sources.model import Source

ENDING = re.compile(
    r"(?i)[-_.](unsloth-bnb-4bit|bnb-[48]bit|gptq|awq|fp8|mxfp4|nvfp4|quantized\.w\d+a\d+|w\d+a\d+|int[48]|[48]bit)([-_.].*)?$"
)


def quantised(source: Source) -> str | None:
    """The sentence for a base whose config.json says that its weights are quantised; None: they are not.

    A run would train on quantised weights whatever LOAD_IN_4BIT says, and nothing can be merged into them.
    """
    config = source.config()
    sections = [config, *(config[key] for key in ("text_config", "llm_config", "language_config") if key in config)]
    keys = ("quantization_config", "compression_config")
    found = [section[key] for section in sections if isinstance(section, dict) for key in keys if section.get(key)]
    if not found:
        return None
    method = _method(found[0] if isinstance(found[0], dict) else {})
    name = source.name if source.commit else Path(source.name).absolute().name
    guess = ENDING.sub("", name)
    if config.get("model_type") == "gpt_oss" and guess == name:
        guess = f"unsloth/{name.rpartition('/')[2]}-BF16"
    original = (
        f"16-bit original, by its name probably MODEL_NAME={guess}"
        if guess != name
        else "16-bit original, or a 16-bit copy of it"
    )
    return (
        f"MODEL_NAME={source.name}: its weights are quantised ({method}), and a run needs 16-bit ones; name the "
        f"{original} (LOAD_IN_4BIT=1 holds that in 4 bits too)"
    )


def _method(config: dict[str, Any]) -> str:
    """The way in which weights are quantised, in words."""
    name = str(config.get("quant_method") or "").lower()
    if name in ("", "bitsandbytes") and (config.get("load_in_4bit") or config.get("_load_in_4bit")):
        return f"bitsandbytes {config.get('bnb_4bit_quant_type') or '4 bit'}"
    if name in ("", "bitsandbytes") and (config.get("load_in_8bit") or config.get("_load_in_8bit")):
        return "bitsandbytes int8"
    bits = config.get("bits") or config.get("w_bit")
    detail = config.get("format") if name == "compressed-tensors" else f"{bits} bit" if bits else None
    return f"{name or 'method unknown'}{f' {detail}' if detail else ''}"
