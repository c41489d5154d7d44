"""Which rows are held out of training, to see whether it helped. docs/adr/0602 says why these. Standard library only: `check` asks too."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from finetune.errors import Refusal
from finetune.settings import Settings

Row = dict[str, Any]

PART = 20  # where all rows are trained, one of so many is held out
LEAST = 8  # rows; fewer tell nothing, and are not worth taking out of training
SPARE = 2  # times EVAL_ROWS are looked at where they cost nothing, because some may be bad or near-duplicates


@dataclasses.dataclass(frozen=True)
class Places:
    """Indices of rows in a split, for training and to hold out. strict: whether a bad held-out row ends the run like a bad trained one.

    It does where the user named it, or would have trained it.
    """

    trained: range
    held: list[int]
    strict: bool = False


def choose(trained: range, total: int, settings: Settings) -> Places:
    """Which rows to hold out of a split of `total` rows whose rows `trained` are asked for: those after them, else those before them.

    Where (almost) none are left, the last ones of them are no longer trained. More than EVAL_ROWS are named where they cost nothing.
    """
    if not settings.eval_rows:
        return Places(trained, [])
    most = SPARE * settings.eval_rows
    after = list(range(trained.stop, min(total, trained.stop + most)))
    before = list(range(max(0, trained.start - most), trained.start))
    if found := next((rows for rows in (after, before) if len(rows) >= LEAST), None):
        return Places(trained, found)
    taken = min(settings.eval_rows, len(trained) // PART)
    if taken < LEAST:
        return Places(trained, [])
    return Places(trained[:-taken], list(trained[-taken:]), strict=True)


def named(trained: range, asked: range, settings: Settings) -> Places:
    """The rows that EVAL_SPLIT names in the split that is trained; those that are trained are left out."""
    free = [index for index in asked if index not in trained]
    return Places(trained, free[: SPARE * settings.eval_rows], strict=True)


def expected(settings: Settings) -> str:
    """A line on what will be held out, as far as it is known before the rows are read."""
    if not settings.eval_rows:
        return "held out: no rows (EVAL_ROWS=0), so the run cannot say whether training helped"
    most = f"at most {settings.eval_rows} rows"
    if settings.eval_dataset_name:
        return f"held out: {most} of {settings.eval_dataset_name}, to see whether training helps"
    if settings.eval_split != "auto":
        return f"held out: {most} of {settings.eval_split}, to see whether training helps"
    return (
        f"held out: {most} beside {settings.dataset_split}, or the last {100 // PART} % of its rows where it is all that there is, to see "
        "whether training helps"
    )


def measured(settings: Settings) -> Settings:
    """Settings that read the rows of EVAL_DATASET_NAME and EVAL_SPLIT as if they were trained."""
    other = settings.eval_dataset_name not in (None, settings.dataset_name)
    return settings.replaced(
        dataset_name=settings.eval_dataset_name or settings.dataset_name,
        dataset_config=None if other else settings.dataset_config,
        dataset_revision="main" if other else settings.dataset_revision,
        dataset_split="train" if settings.eval_split == "auto" else settings.eval_split,
        eval_rows=0,
    )


def elsewhere(settings: Settings) -> bool:
    """Whether the held-out rows are not of the split that is trained."""
    if settings.eval_dataset_name not in (None, settings.dataset_name):
        return True
    return settings.eval_split != "auto" and _name(settings.eval_split) != _name(settings.dataset_split)


@contextlib.contextmanager
def named_by_its_setting(settings: Settings) -> Iterator[None]:
    """Let refusals name the settings that the held-out rows come from."""
    try:
        yield
    except Refusal as refusal:
        said = map(of_evaluation, refusal.problems) if settings.eval_dataset_name else refusal.problems
        raise type(refusal)(*(re.sub(r"\bDATASET_SPLIT=", "EVAL_SPLIT=", problem) for problem in said)) from None


def of_evaluation(problem: str) -> str:
    """A sentence on DATASET_NAME as one on EVAL_DATASET_NAME."""
    return re.sub(r"\bDATASET_NAME=", "EVAL_DATASET_NAME=", problem)


def _name(split: str) -> str:
    """A split's name, without its slice."""
    return split.partition("[")[0]


@dataclasses.dataclass(frozen=True)
class Question:
    """A held-out row as a question. prompt: all up to its last answer; reference: that answer."""

    prompt: str
    reference: str


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Rows to measure on. rows: input_ids and labels; places: of each, for messages; name: of their data set. questions: of the first.

    truncated: longer than MAX_SEQ_LENGTH. dropped: cannot be measured. duplicates: left out as near-duplicates. sha256: of ids and labels.
    """

    name: str
    rows: list[Row]
    places: list[str]
    questions: list[Question]
    truncated: int
    dropped: int
    duplicates: int
    sha256: str

    def record(self) -> dict[str, Any]:
        """What run.json says of the rows."""
        return dict(
            name=self.name,
            truncated=self.truncated,
            dropped=self.dropped,
            duplicates=self.duplicates,
            tokens_sha256=self.sha256,
        )

    def describe(self) -> str:
        """A line for the console."""
        left = f", {self.dropped} dropped" if self.dropped else ""
        left += f", {self.duplicates} left out as near-duplicates of others" if self.duplicates else ""
        cut = f", {self.truncated} truncated" if self.truncated else ""
        if self.rows:
            return f"held out: {len(self.rows)} rows ({self.places[0]} to {self.places[-1]}){cut}{left}"
        return (
            f"held out: no rows{left or ', since there are too few to give any up'}, so this run cannot say whether training helped; "
            "EVAL_DATASET_NAME names other rows, for example EVAL_DATASET_NAME=held-out.jsonl"
        )
