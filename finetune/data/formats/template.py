"""Rows with columns, which fill the places of a text: the tutorial's template, or that of a file."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from finetune.data import checks
from finetune.data.formats.base import BadRow, Row, Text
from finetune.data.formats.filled import Filler
from finetune.errors import SettingsError
from finetune.settings import WAYS, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    def fill(self, values: list[str]) -> tuple[str, int, list[int]]:
        """The whole text, how many of its characters are the prompt, and where each value begins."""
        parts = self.text.split("{}")
        filled, starts = parts[0], []
        end = len(filled.rstrip())
        for number, (value, part) in enumerate(zip(values, parts[1:], strict=True), 1):
            starts.append(len(filled))
            filled += value + part
            if number == self.asked:
                end = len(filled.rstrip())
        return filled, end, starts

    def prompt(self, question: str) -> str:
        """What the model is given at inference: the tutorial's template up to `<think>`."""
        text, length, _ = self.fill([question, *[""] * (self.text.count("{}") - 1)])
        return text[:length]


@dataclasses.dataclass(frozen=True)
class Columns:
    """The format of rows with columns."""

    NAME: ClassVar[str] = "columns"
    TOLD: ClassVar[str] = "PROMPT_COLUMNS and COMPLETION_COLUMNS"
    template: Template
    columns: tuple[str, ...]
    filler: Filler

    @classmethod
    def recognises(cls, row: Row, settings: Settings) -> bool:
        """Any row: what is wrong with it is said then."""
        return True

    @classmethod
    def needs(cls, settings: Settings) -> tuple[str, ...]:
        """PROMPT_COLUMNS and COMPLETION_COLUMNS."""
        return settings.prompt_columns + settings.completion_columns

    @classmethod
    def reads(cls, settings: Settings) -> tuple[str, ...]:
        """No others."""
        return cls.needs(settings)

    @classmethod
    def problem(cls, row: Row, settings: Settings) -> str | None:
        """Each column has to hold text; of several PROMPT_COLUMNS some may be empty, such as Alpaca's input."""
        asked = [column for column in settings.prompt_columns if not checks.empty(row.get(column))]
        for column in cls.needs(settings):
            if column not in row:
                return f"has no column {column}; its columns are {', '.join(map(str, row)) or 'none'}"
            if asked and column in settings.prompt_columns and checks.empty(row[column]):
                continue
            if wrong := checks.bad_text(row[column]):
                return f"column {column} {wrong}"
        return None

    @classmethod
    def check(cls, settings: Settings) -> None:
        """The template has to have a place for each column."""
        template(settings)

    @classmethod
    def of(cls, settings: Settings, tokenizer: PreTrainedTokenizerBase, day: datetime.date) -> Columns:
        """The format that settings and tokenizer make."""
        return cls(template(settings), cls.needs(settings), Filler.of(tokenizer))

    @property
    def writes_day(self) -> bool:
        """Never."""
        return False

    def text(self, row: Row) -> Text:
        """The filled template; the answer is what follows the prompt columns."""
        given = ["" if checks.empty(row[column]) else checks.text(row[column]) for column in self.columns]
        values = [self.filler.without_bos(given[0]), *given[1:]]
        values[-1] = self.filler.without_eos(values[-1])
        for column, value, was in zip(self.columns, values, given, strict=True):
            if was and not value.strip():
                raise BadRow(
                    f"column {column} holds nothing but {self.filler.eos if column == self.columns[-1] else self.filler.bos}"
                )
        text, prompt, starts = self.template.fill(values)
        places = [(start, start + len(value)) for start, value in zip(starts, values, strict=True)]
        said = {"marked"} if values != given else set()
        if any(checks.is_bare(row[column]) for column in self.columns):
            said.add("as_json")
        return Text(text, [(prompt, len(text))], self.filler.literal(text, places), said=frozenset(said))

    def prompt(self, question: str) -> str:
        """The template up to its answer."""
        return self.template.prompt(question)


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
    if settings.prompt_template in WAYS:
        return
    try:
        _template_file(settings)
    except SettingsError as error:
        yield from error.problems


def _template_file(settings: Settings) -> str:
    """The text of the file that PROMPT_TEMPLATE names, or the tutorial's."""
    if settings.prompt_template is None:
        return TEMPLATE
    if settings.prompt_template in WAYS:
        raise SettingsError(
            f"PROMPT_TEMPLATE={settings.prompt_template}: is for rows with instruction and output; rows with columns of your own "
            "take the path of a text file"
        )
    path = Path(settings.prompt_template).expanduser()
    if path.exists() and not path.is_file():
        raise SettingsError(f"PROMPT_TEMPLATE={settings.prompt_template}: is no file; give the path of a text file")
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise SettingsError(f"PROMPT_TEMPLATE={settings.prompt_template}: cannot be read ({why})") from None
