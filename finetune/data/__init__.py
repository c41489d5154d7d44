"""Rows -> training text -> tokens: where the rows come from, what is refused, and what the loss is on.

Here datasets, pyarrow and transformers are imported in functions. `check` needs this package and none of them, and unsloth
has to be imported before transformers.
"""

from finetune.data.formats.template import TEMPLATE, Template, template
from finetune.data.locate import on_hub
from finetune.data.processes import FEW_ROWS
from finetune.data.rows import Rows, load
from finetune.data.shown import IGNORE_INDEX
from finetune.data.tokenizer_files import load as tokenizer
from finetune.data.tokenizer_files import misread, rewritten
from finetune.data.tokens import Tokens, format_of, tokenize

__all__ = [
    "FEW_ROWS",
    "IGNORE_INDEX",
    "TEMPLATE",
    "Rows",
    "Template",
    "Tokens",
    "format_of",
    "load",
    "misread",
    "on_hub",
    "rewritten",
    "template",
    "tokenize",
    "tokenizer",
]
