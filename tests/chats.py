"""Tokenizers with the chat templates of the field, as trl ships them or as they are in tests/chat_templates, and what is trained of rows."""

from __future__ import annotations

import copy
import datetime
import functools
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import tiny
from finetune import data
from finetune.settings import Settings

# the end of an answer, in the middle and at the end of a conversation
ENDS = {
    "qwen2_5": ("<|im_end|>", "<|im_end|>"),
    "qwen3": ("<|im_end|>", "<|im_end|>"),
    "qwen3_instruct_2507": ("<|im_end|>", "<|im_end|>"),
    "qwen3_5_think": ("<|im_end|>", "<|im_end|>"),
    "phi3": ("<|end|>", "<|endoftext|>"),
    "llama3": ("<|eot_id|>", "<|eot_id|>"),
    "llama3_1": ("<|eot_id|>", "<|eot_id|>"),
    "gemma3": ("<end_of_turn>", "<end_of_turn>"),
    "gptoss": ("<|end|>", "<|return|>"),
    "deepseek_r1_distill": ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "lfm2": ("<|im_end|>", "<|im_end|>"),
    "cohere2": ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "cohere": ("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "qwen3_6": ("<|im_end|>", "<|im_end|>"),
    "glm4moe": ("<|user|>", "<|endoftext|>"),
    "llama2": (" </s>", " </s>"),
    "mistral": ("</s>", "</s>"),
    "phi4": ("<|im_end|>", "<|im_end|>"),
    "smollm2": ("<|im_end|>", "<|im_end|>"),
}


def source(name: str) -> str:
    own = Path(__file__).parent / "chat_templates" / f"{name}.jinja"  # of models whose template trl does not ship
    if own.is_file():
        return own.read_text(encoding="utf-8")
    return resources.files("trl").joinpath(f"chat_templates/{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def plain() -> Any:
    return tiny.tokenizer("qwen2")


def words(name: str, eos: str) -> Any:
    """A tokenizer with the template and the special tokens that stand in it."""
    made = copy.deepcopy(plain())
    template = source(name)
    special = {*re.findall(r"<\|[\w▁]+\|>|<｜[\w▁]+｜>|<(?:start|end)_of_turn>", template), eos, "<bos>"} - {
        "<｜tool▁sep｜>"
    }
    made.add_special_tokens({"additional_special_tokens": sorted(special)})
    made.eos_token, made.bos_token = eos, "<bos>"
    made.chat_template = template
    return made


def tokens(folder: Path, tokenizer: Any, rows: list[Any], **values: Any) -> data.Tokens:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    settings = Settings.from_env({"DATASET_NAME": str(path), "TRAIN_ON": "response", **values})
    return data.tokenize(data.load(settings), tokenizer, settings, datetime.date(2024, 7, 26))


def trained(made: data.Tokens, tokenizer: Any) -> str:
    row = made.dataset[0]
    return str(tokenizer.decode([label for label in row["labels"] if label != data.IGNORE_INDEX]))


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return dict(role=role, content=content, **more)


def eos(template: str) -> str:
    """The EOS of the models that have the template."""
    if template == "cohere2":
        return "<|END_OF_TURN_TOKEN|>"
    return ENDS[template][1].strip() if template in ENDS else "<|im_end|>"
