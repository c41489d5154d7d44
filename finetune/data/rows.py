"""Where the rows come from, which of them are taken, and which are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from finetune import sources
from finetune.data import checks, locate, reading
from finetune.data.formats import FORMATS
from finetune.data.reading import Row, Unread
from finetune.errors import SettingsError
from finetune.settings import SPLIT, Settings
from finetune.sources import local

SHOWN = 5  # bad rows named in one message
Placed = tuple[str, Any]  # a row, after "rows.jsonl row 3 (line 4)"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that passed the checks. format: their form's name. seen, dropped: rows read, and left out.

    places: of each row, for messages. sha256: of their texts in order, so that equal data is known as equal.
    """

    name: str
    commit: str | None
    rows: list[Row]
    format: str
    seen: int
    dropped: int
    sha256: str
    places: list[str]

    def record(self) -> dict[str, Any]:
        """What run.json says of the data."""
        return dict(
            name=self.name,
            commit=self.commit,
            format=self.format,
            seen=self.seen,
            dropped=self.dropped,
            sha256=self.sha256,
        )


def load(settings: Settings) -> Rows:
    """Read and check the rows that DATASET_NAME and DATASET_SPLIT name.

    Raises SettingsError that names file and row of the bad ones; with DROP_BAD_ROWS they are left out and counted.
    """
    name = settings.dataset_name
    if problem := local.url("DATASET_NAME", name):
        raise SettingsError(problem)
    commit, found = (
        _from_hub(settings) if locate.on_hub(name) else (None, _slice(settings, list(_from_files(settings))))
    )
    if not found:
        raise SettingsError(f"DATASET_NAME={name}: holds no rows in {settings.dataset_split}")
    first: Row = next((row for _, row in found if isinstance(row, dict)), {})
    form = next(form for form in FORMATS.values() if form.recognises(first, settings))
    needs, reads = form.needs(settings), form.reads(settings)
    good, bad, places = [], [], []
    for where, row in found:
        if problem := form.problem(row, settings) if isinstance(row, dict) else _no_object(row):
            bad.append(f"{where}: {problem}")
        else:
            good.append({column: row[column] for column in reads if column in needs or row.get(column)})
            places.append(where)
    refuse(bad, len(found), settings, f"every row needs text in {', '.join(needs)}")
    if not good:
        raise SettingsError(f"DATASET_NAME={name}: all {len(bad)} rows are malformed; the first is {bad[0]}")
    form.check(settings)  # refused now, and not after a model was downloaded
    digest = hashlib.sha256(json.dumps(good, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    return Rows(name, commit, good, form.NAME, len(found), len(bad), digest, places)


def _no_object(row: Any) -> str:
    return row if isinstance(row, Unread) else f"is {checks.kind(row)}, not an object"


def refuse(bad: list[str], of: int, settings: Settings, needed: str) -> None:
    """Raise SettingsError that names bad rows, unless DROP_BAD_ROWS is set. bad: sentences; of: rows in all; needed: what a row needs."""
    if bad and not settings.drop_bad_rows:
        more = f" (and {len(bad) - SHOWN} more)" if len(bad) > SHOWN else ""
        raise SettingsError(
            *bad[:SHOWN],
            f"{len(bad)} of {of} rows are malformed{more}: {needed}. Mend them, name other columns (PROMPT_COLUMNS, "
            "COMPLETION_COLUMNS), or leave them out with DROP_BAD_ROWS=1.",
        )


def _from_files(settings: Settings) -> Iterator[Placed]:
    """The rows of the files that DATASET_NAME names."""
    notes: list[str] = []
    found = locate.files(settings, notes)
    for note in notes:
        print(f"data: {note}", flush=True)
    for file in found:
        for number, line, row in reading.rows(file, _wanted(settings)):
            yield f"{file.shown} row {number}{f' (line {line})' if line else ''}", row


def _from_hub(settings: Settings) -> tuple[str | None, list[Placed]]:
    """The rows of a split on the Hub, and their commit."""
    name, split = settings.dataset_name, locate.split_of(settings)
    commit, found = sources.hub().dataset(settings, split)
    names, which = found.column_names, _range(settings, len(found))
    # others may hold pictures, or values that Python cannot. If none is wanted, keep one: without columns there are no rows
    used = [column for column in names if column in _wanted(settings)] or names[:1]
    rows = found.select(which).select_columns(used)
    return commit, [
        (f"{name} {split} row {index + 1}", {**dict.fromkeys(names), **row})
        for index, row in zip(which, rows, strict=True)
    ]


def _wanted(settings: Settings) -> set[str]:
    """Columns that rows may be made of."""
    return {column for form in FORMATS.values() for column in form.reads(settings)}


def _slice(settings: Settings, rows: list[Placed]) -> list[Placed]:
    return [rows[index] for index in _range(settings, len(rows))]


def _range(settings: Settings, count: int) -> range:
    """The rows that the slice of DATASET_SPLIT takes out of `count`; bounds beyond the end mean the end."""
    parsed = re.fullmatch(SPLIT, settings.dataset_split)
    assert parsed is not None  # checked by settings

    def bound(text: str | None) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)

    return range(*slice(bound(parsed["start"]), bound(parsed["stop"])).indices(count))
