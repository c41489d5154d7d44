"""The text that a row's columns are put into: the tutorial's, or that of a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import SettingsError
from finetune.settings import Settings

TEMPLATE = """Below is an instruction that describes a task, paired with an input that provides further context.
Write a response that appropriately completes the request.
Before answering, think carefully about the question and create a step-by-step chain of thoughts to ensure a logical and accurate response.
### Instruction:
You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment planning.
Please answer the following medical question.
### Question:
{}
### Response:
<think>
{}
</think>
{}"""


@dataclasses.dataclass(frozen=True)
class Template:
    """The training text. asked: how many of its {} are filled by PROMPT_COLUMNS."""

    text: str
    asked: int

    def fill(self, values: list[str]) -> tuple[str, int]:
        """The whole text, and how many of its characters are the prompt."""
        parts = self.text.split("{}")
        pieces = [parts[0]]
        for value, part in zip(values, parts[1:], strict=True):
            pieces += [value, part]
        prompt = "".join(pieces[: 2 * self.asked + 1]).rstrip()
        return "".join(pieces), len(prompt)

    def prompt(self, question: str) -> str:
        """What the model is given at inference: the tutorial's template up to `<think>`."""
        values = [question, *[""] * (self.text.count("{}") - 1)]
        text, length = self.fill(values)
        return text[:length]


def template(settings: Settings) -> Template:
    """The template of PROMPT_TEMPLATE, or the tutorial's. Raises SettingsError where its {} do not fit the columns."""
    text, columns = _template_file(settings), settings.prompt_columns + settings.completion_columns
    named = settings.prompt_template is not None
    shown = f"PROMPT_TEMPLATE={settings.prompt_template}" if named else "the medical reasoning template"
    if text.count("{}") != len(columns):
        raise SettingsError(
            f"{shown}: has {text.count('{}')} places {{}} for {len(columns)} columns ({', '.join(columns)}); give one {{}} for "
            "each of PROMPT_COLUMNS and COMPLETION_COLUMNS, in that order, in the file that PROMPT_TEMPLATE names"
        )
    return Template(text, len(settings.prompt_columns))


def missing(settings: Settings) -> Iterator[str]:
    """What is wrong with the file that PROMPT_TEMPLATE names, in a sentence."""
    try:
        _template_file(settings)
    except SettingsError as error:
        yield from error.problems


def _template_file(settings: Settings) -> str:
    """The text of the file that PROMPT_TEMPLATE names, or the tutorial's."""
    if settings.prompt_template is None:
        return TEMPLATE
    path = Path(settings.prompt_template).expanduser()
    if path.exists() and not path.is_file():
        raise SettingsError(f"PROMPT_TEMPLATE={settings.prompt_template}: is no file; give the path of a text file")
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise SettingsError(f"PROMPT_TEMPLATE={settings.prompt_template}: cannot be read ({why})") from None
