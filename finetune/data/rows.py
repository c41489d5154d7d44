"""Where the rows come from, which of them are taken, and which are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune import sources
from finetune.data import checks, held_out, reading
from finetune.data.formats import FORMATS, Format
from finetune.data.reading import Placed, Row
from finetune.errors import SettingsError
from finetune.settings import SPLIT, Settings
from finetune.sources import local

DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json")  # which `datasets` puts beside the rows
SHOWN = 5  # bad rows named in one message
SAMPLES = Path(__file__).parent.parent / "samples"


@dataclasses.dataclass(frozen=True)
class Held:
    """Rows that are held out, at least as many as are wanted. format: their form's name; dropped: rows that were left out as malformed.

    strict: whether a bad one ends the run, because the user named them, or would have trained them.
    """

    name: str
    rows: list[Row]
    format: str
    dropped: int
    places: list[str]
    strict: bool


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that passed the checks. format: their form's name. seen, dropped: rows read, and left out.

    places: of each row, for messages. sha256: of their texts in order, so that equal data is known as equal. held: rows that are held
    out of training.
    """

    name: str
    commit: str | None
    rows: list[Row]
    format: str
    seen: int
    dropped: int
    sha256: str
    places: list[str]
    held: Held | None = None

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


def on_hub(name: str) -> bool:
    """Whether DATASET_NAME is a name on the Hub: not the bundled rows, not on this machine, and not named like a file."""
    a_file = name.lower().endswith(tuple(reading.READERS)) or name.startswith((".", "/", "~"))
    return name != "samples" and not a_file and not os.path.exists(name)


def load(settings: Settings) -> Rows:
    """Read and check the rows that DATASET_NAME and DATASET_SPLIT name.

    Raises SettingsError that names file and row of the bad ones; with DROP_BAD_ROWS they are left out and counted.
    """
    if problems := list(missing(settings)):
        raise SettingsError(*problems)
    name = settings.dataset_name
    commit, found, held = _read(settings)
    if not found:
        raise SettingsError(f"DATASET_NAME={name}: holds no rows in {settings.dataset_split}")
    form, good, places, bad = _good(found, settings)
    refuse(bad, len(found), settings, f"every row needs text in {', '.join(form.needs(settings))}")
    if not good:
        raise SettingsError(f"DATASET_NAME={name}: all {len(bad)} rows are malformed; the first is {bad[0]}")
    form.check(settings)  # refused now, and not after a model was downloaded
    digest = hashlib.sha256(json.dumps(good, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    return Rows(name, commit, good, form.NAME, len(found), len(bad), digest, places, _held(held, settings))


def _good(found: list[Placed], settings: Settings) -> tuple[type[Format], list[Row], list[str], list[str]]:
    """The rows' form, those that are good with their places, and a sentence for each that is not."""
    first: Row = next((row for _, row in found if isinstance(row, dict)), {})
    form = next(form for form in FORMATS.values() if form.recognises(first, settings))
    needs, reads = form.needs(settings), form.reads(settings)
    good, bad, places = [], [], []
    for where, row in found:
        if problem := form.problem(row, settings) if isinstance(row, dict) else f"is {checks.kind(row)}, not an object":
            bad.append(f"{where}: {problem}")
        else:
            good.append({column: row[column] for column in reads if column in needs or row.get(column)})
            places.append(where)
    return form, good, places, bad


def _held(of_split: tuple[list[Placed], bool], settings: Settings) -> Held | None:
    """The rows that are held out. of_split: those of the split that is trained, and whether a bad one ends the run."""
    if not settings.eval_rows:
        return None
    if held_out.elsewhere(settings):
        return held_elsewhere(settings)
    found, strict = of_split
    return _checked(settings.dataset_name, found, strict, settings)


def held_elsewhere(settings: Settings) -> Held:
    """The rows that EVAL_DATASET_NAME and EVAL_SPLIT name, whatever is trained. Raises SettingsError where there are none, or bad ones."""
    there = held_out.measured(settings)
    with held_out.named_by_its_setting(settings):
        if problems := list(_missing(there.dataset_name)):
            raise SettingsError(*problems)
        _, found, _ = _read(there)
        if not found:
            raise SettingsError(
                f"DATASET_SPLIT={there.dataset_split}: {there.dataset_name} holds no rows there; name others, for example "
                "DATASET_SPLIT=train[500:564]"
            )
    return _checked(there.dataset_name, found[: held_out.SPARE * settings.eval_rows], True, settings)


def _checked(name: str, found: list[Placed], strict: bool, settings: Settings) -> Held:
    if not found:
        return Held(name, [], "", 0, [], strict)
    form, good, places, bad = _good(found, settings)
    if strict:
        refuse(bad, len(found), settings, "held-out rows need what trained rows need")
    return Held(name, good, form.NAME, len(bad), places, strict)


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
    """The rows of DATASET_NAME: of a file, of all files in a folder one after the other, or the bundled ones (one language or both)."""
    if settings.dataset_name == "samples":
        languages = [settings.dataset_config] if settings.dataset_config else ["en", "zh"]
        files = {f"samples/{language}.jsonl": SAMPLES / f"{language}.jsonl" for language in languages}
    else:
        path = Path(settings.dataset_name).expanduser()
        files = {settings.dataset_name: path}
        if path.is_dir():
            files = {f"{settings.dataset_name.rstrip('/')}/{name}": path / name for name in _row_files(path)}
            print(f"data: {settings.dataset_name}: {', '.join(_row_files(path))}", flush=True)
    for shown, file in files.items():
        for where, row in reading.rows(file, _wanted(settings)):
            yield f"{shown} {where}", row


def _row_files(folder: Path) -> list[str]:
    """Names of the files in the folder and in its data/ that hold the rows of the split `train`, sorted.

    Others lie beside them, such as README.md. Where some are named after `train`, the rest are other splits, as the Hub has them.
    """
    found = [path for path in (*folder.iterdir(), *folder.glob("data/*")) if path.suffix.lower() in reading.READERS]
    rows = [path for path in found if path.is_file() and path.name[0] != "." and path.name not in DESCRIPTIONS]
    train = [path for path in rows if re.match(r"train(?![a-z])", path.name, re.IGNORECASE)]
    return sorted(str(path.relative_to(folder)) for path in train or rows)


def _read(settings: Settings) -> tuple[str | None, list[Placed], tuple[list[Placed], bool]]:
    """The commit of the data set, the rows to train, and those to hold out of the same split with whether a bad one ends the run."""
    if on_hub(settings.dataset_name):
        return _from_hub(settings)
    if _split(settings.dataset_split)["name"] != "train":
        raise SettingsError(
            f"DATASET_SPLIT={settings.dataset_split}: a file or folder has only the split train, for example DATASET_SPLIT=train[0:500]"
        )
    rows = list(_from_files(settings))
    places = _places(settings, len(rows))
    return None, [rows[index] for index in places.trained], ([rows[index] for index in places.held], places.strict)


def _from_hub(settings: Settings) -> tuple[str | None, list[Placed], tuple[list[Placed], bool]]:
    """The same of a split on the Hub."""
    name, split = settings.dataset_name, str(_split(settings.dataset_split)["name"])
    commit, found = sources.hub().dataset(settings, split)
    names, places = found.column_names, _places(settings, len(found))
    # others may hold pictures, or values that Python cannot. If none is wanted, keep one: without columns there are no rows
    used = [column for column in names if column in _wanted(settings)] or names[:1]

    def placed(which: Sequence[int]) -> list[Placed]:
        rows = found.select(which).select_columns(used)
        return [
            (f"{name} {split} row {index + 1}", {**dict.fromkeys(names), **row})
            for index, row in zip(which, rows, strict=True)
        ]

    return commit, placed(places.trained), (placed(places.held), places.strict)


def _places(settings: Settings, count: int) -> held_out.Places:
    """Which rows of a split of `count` rows are trained, and which are held out."""
    trained = _range(settings.dataset_split, count)
    if not settings.eval_rows or held_out.elsewhere(settings):
        return held_out.Places(trained, [])
    if settings.eval_split == "auto":
        return held_out.choose(trained, count, settings)
    found = held_out.named(trained, _range(settings.eval_split, count), settings)
    if not found.held:
        raise SettingsError(
            f"EVAL_SPLIT={settings.eval_split}: names no rows beside those of DATASET_SPLIT={settings.dataset_split}, which are trained; "
            "name others, for example EVAL_SPLIT=train[500:564], or EVAL_ROWS=0"
        )
    return found


def missing(settings: Settings) -> Iterator[str]:
    """What is wrong with the files or folders that DATASET_NAME and EVAL_DATASET_NAME name, in sentences."""
    yield from _missing(settings.dataset_name)
    if settings.eval_rows and settings.eval_dataset_name not in (None, settings.dataset_name):
        yield from map(held_out.of_evaluation, _missing(str(settings.eval_dataset_name)))


def _missing(name: str) -> Iterator[str]:
    if problem := local.url("DATASET_NAME", name):
        yield problem
    elif name != "samples" and not on_hub(name):
        path = Path(name).expanduser()
        if path.is_dir():
            yield from _folder_without_rows(name, path)
        elif path.suffix.lower() not in reading.READERS:
            yield (
                f"DATASET_NAME={name}: not a known kind of file; it takes {', '.join(reading.READERS)}, for example DATASET_NAME=rows.jsonl"
            )
        elif not path.is_file():
            yield f"DATASET_NAME={name}: there is no such file; give its path, in a container the one it is mounted at"


def _folder_without_rows(name: str, path: Path) -> Iterator[str]:
    kinds = sorted({Path(file).suffix.lower() for file in _row_files(path)})
    if not kinds:
        yield (
            f"DATASET_NAME={name}: the folder holds no rows; it takes files of one kind out of {', '.join(reading.READERS)}, in the "
            "folder or in its data/, for example train-00000.parquet and train-00001.parquet"
        )
    elif len(kinds) > 1:
        file = next(file for file in _row_files(path) if file.lower().endswith(kinds[0]))
        yield (
            f"DATASET_NAME={name}: the folder holds rows of {len(kinds)} kinds ({', '.join(kinds)}), and it takes one; name one "
            f"file, for example DATASET_NAME={name.rstrip('/')}/{file}"
        )


def _wanted(settings: Settings) -> set[str]:
    """Columns that rows may be made of."""
    return {column for form in FORMATS.values() for column in form.reads(settings)}


def _split(split: str) -> re.Match[str]:
    """A split and its slice, taken apart."""
    parsed = re.fullmatch(SPLIT, split)
    assert parsed is not None  # checked by settings
    return parsed


def _range(split: str, count: int) -> range:
    """The rows that the slice of a split takes out of `count`; bounds beyond the end mean the end."""
    parsed = _split(split)

    def bound(text: str | None) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)

    return range(*slice(bound(parsed["start"]), bound(parsed["stop"])).indices(count))
