"""The forms that rows have, one file each. A new one is one more file, one more entry here, and its tests."""

from __future__ import annotations

from finetune.data.checks import empty
from finetune.data.formats.alpaca import Alpaca
from finetune.data.formats.base import Format as Format
from finetune.data.formats.base import Row
from finetune.data.formats.messages import PICTURES, Messages
from finetune.data.formats.prompt_completion import PromptCompletion, PromptCompletionChat
from finetune.data.formats.sharegpt import ShareGPT
from finetune.data.formats.template import Columns
from finetune.data.formats.text import PlainText
from finetune.errors import SettingsError
from finetune.settings import Settings

# in the order in which rows are tried; the last takes all that no other recognises
FORMATS: dict[str, type[Format]] = {
    kind.NAME: kind for kind in (Messages, ShareGPT, Alpaca, PromptCompletionChat, PromptCompletion, PlainText, Columns)
}
PREFERENCES = ("chosen", "rejected", "kto_tag")  # columns of rows that rate answers


def choose(row: Row, settings: Settings) -> type[Format]:
    """The form of rows whose first is `row`: DATASET_FORMAT's, that of the columns which settings name, or the one that is recognised.

    Raises SettingsError where settings contradict the rows, or where the rows rate answers.
    """
    known = next(form for form in FORMATS.values() if form.recognises(row, settings))
    if settings.dataset_format != "auto":
        return FORMATS[settings.dataset_format]
    if not set(Columns.needs(settings)) - set(row):
        return Columns
    if row and known is not Columns and (named := _named(settings, known)):
        absent = [column for column in Columns.needs(settings) if column not in row]
        raise SettingsError(
            f"{named} is for rows with columns, and rows of {settings.dataset_name} have no {' and no '.join(absent)}, but "
            f"{known.TOLD} (their columns are {', '.join(map(str, row))}). Leave out {named} to train them as "
            f"DATASET_FORMAT={known.NAME}, or name columns that are there"
        )
    rated = [column for column in PREFERENCES if not empty(row.get(column)) or isinstance(row.get(column), bool)]
    if isinstance(row.get("label"), bool) and known in (PromptCompletion, PromptCompletionChat):
        rated.append("label")
    if rated:
        example = f"DATASET_FORMAT={known.NAME}" if known is not Columns else "COMPLETION_COLUMNS=chosen"
        raise SettingsError(
            f"DATASET_NAME={settings.dataset_name}: {' and '.join(rated)} rate answers, as preference training needs it, and this "
            f"program would train good and bad ones alike; take the good rows alone. To train them all the same: {example}"
        )
    pictures = [column for column in PICTURES if column in row and row[column] is None]
    if pictures and known is not Columns and pictures[0] in known.reads(settings):
        raise SettingsError(
            f"DATASET_NAME={settings.dataset_name}: has a column {pictures[0]}, and this program trains text alone. To train the text "
            f"of these rows: DATASET_FORMAT={known.NAME}"
        )
    return known


def wanted(settings: Settings) -> set[str]:
    """Columns that rows may be made of. Pictures are not read: they are large, and not trained."""
    forms = FORMATS.values() if settings.dataset_format == "auto" else [FORMATS[settings.dataset_format]]
    rated = (*PREFERENCES, "label") if settings.dataset_format == "auto" else ()
    return {column for form in forms for column in form.reads(settings)}.union(rated) - set(PICTURES)


def told(row: Row, form: type[Format], settings: Settings) -> str:
    """A line on the form of the rows, and on what in the first of them is not trained."""
    others = [str(column) for column in row if column not in form.reads(settings)]
    has = ", ".join(form.needs(settings)) if form is Columns else form.TOLD
    left = f"; columns that are not trained: {', '.join(others)}" if others else ""
    why = "as DATASET_FORMAT says" if settings.dataset_format != "auto" else f"for they have {has}"
    return f"data: {settings.dataset_name}: rows of form {form.NAME}, {why}{left}"


def _named(settings: Settings, known: type[Format]) -> str:
    """The settings that only columns have, where they are not the defaults."""
    file = settings.template_file if known is Alpaca else settings.prompt_template
    given = dict(
        PROMPT_COLUMNS=settings.prompt_columns != Settings.prompt_columns,
        COMPLETION_COLUMNS=settings.completion_columns != Settings.completion_columns,
        PROMPT_TEMPLATE=file is not None,
    )
    return " and ".join(name for name, changed in given.items() if changed)


def needed(form: type[Format], settings: Settings) -> str:
    """What every row of a form needs, and which other forms there are, in words."""
    if form is not Columns:
        return f"rows of form {form.NAME} need {form.TOLD}"
    others = ", or ".join(other.TOLD for other in FORMATS.values() if other is not Columns)
    return (
        f"every row needs text in {', '.join(form.needs(settings))}. Name other columns with PROMPT_COLUMNS and COMPLETION_COLUMNS; "
        f"or take rows of another form, with {others}"
    )
