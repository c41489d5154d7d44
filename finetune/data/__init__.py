"""Rows -> training text -> tokens: where the rows come from, what is refused, and what the loss is on."""

from finetune.data.processes import FEW_ROWS
from finetune.data.prompt import TEMPLATE, Template, template
from finetune.data.rows import Rows, load, on_hub
from finetune.data.tokens import IGNORED, Tokens, tokenize, tokenizer

__all__ = [
    "FEW_ROWS",
    "IGNORED",
    "TEMPLATE",
    "Rows",
    "Template",
    "Tokens",
    "load",
    "on_hub",
    "template",
    "tokenize",
    "tokenizer",
]
