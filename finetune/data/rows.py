"""Where the rows come from, which of them are taken, and which are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune import sources
from finetune.data import checks, formats, reading
from finetune.data.reading import Placed, Row
from finetune.errors import SettingsError
from finetune.settings import SPLIT, Settings
from finetune.sources import local

DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json")  # which `datasets` puts beside the rows
SHOWN = 5  # bad rows named in one message
SAMPLES = Path(__file__).parent.parent / "samples"


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
    commit, found = _from_hub(settings) if on_hub(name) else (None, _slice(settings, list(_from_files(settings))))
    if not found:
        raise SettingsError(f"DATASET_NAME={name}: holds no rows in {settings.dataset_split}")
    first: Row = next((row for _, row in found if isinstance(row, dict)), {})
    form = formats.choose(first, settings)
    needs, reads = form.needs(settings), form.reads(settings)
    good, bad, places = [], [], []
    for where, row in found:
        if problem := form.problem(row, settings) if isinstance(row, dict) else f"is {checks.kind(row)}, not an object":
            bad.append(f"{where}: {problem}")
        else:
            there = (column for column in reads if column in row)
            good.append({column: row[column] for column in there if column in needs or not checks.empty(row[column])})
            places.append(where)
    refuse(bad, len(found), settings, formats.needed(form, settings))
    if not good:
        raise SettingsError(f"DATASET_NAME={name}: all {len(bad)} rows are malformed; the first is {bad[0]}")
    form.check(settings)  # refused now, and not after a model was downloaded
    print(formats.told(first, form, settings), flush=True)
    digest = hashlib.sha256(json.dumps(good, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    return Rows(name, commit, good, form.NAME, len(found), len(bad), digest, places)


def refuse(bad: list[str], of: int, settings: Settings, needed: str) -> None:
    """Raise SettingsError that names bad rows, unless DROP_BAD_ROWS is set. bad: sentences; of: rows in all; needed: what a row needs."""
    if bad and not settings.drop_bad_rows:
        more = f" (and {len(bad) - SHOWN} more)" if len(bad) > SHOWN else ""
        raise SettingsError(
            *bad[:SHOWN],
            f"{len(bad)} of {of} rows are malformed{more}: {needed}. Mend them, or leave them out with DROP_BAD_ROWS=1.",
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
        for where, row in reading.rows(file, formats.wanted(settings)):
            yield f"{shown} {where}", row


def _row_files(folder: Path) -> list[str]:
    """Names of the files in the folder and in its data/ that hold the rows of the split `train`, sorted.

    Others lie beside them, such as README.md. Where some are named after `train`, the rest are other splits, as the Hub has them.
    """
    found = [path for path in (*folder.iterdir(), *folder.glob("data/*")) if path.suffix.lower() in reading.READERS]
    rows = [path for path in found if path.is_file() and path.name[0] != "." and path.name not in DESCRIPTIONS]
    train = [path for path in rows if re.match(r"train(?![a-z])", path.name, re.IGNORECASE)]
    return sorted(str(path.relative_to(folder)) for path in train or rows)


def _from_hub(settings: Settings) -> tuple[str | None, list[Placed]]:
    """The rows of a split on the Hub, and their commit."""
    name, split = settings.dataset_name, str(_split(settings)["name"])
    commit, found = sources.hub().dataset(settings, split)
    names, which = found.column_names, _range(settings, len(found))
    # others may hold pictures, or values that Python cannot. If none is wanted, keep one: without columns there are no rows
    used = [column for column in names if column in formats.wanted(settings)] or names[:1]
    rows = found.select(which).select_columns(used)
    return commit, [
        (f"{name} {split} row {index + 1}", {**dict.fromkeys(names), **row})
        for index, row in zip(which, rows, strict=True)
    ]


def missing(settings: Settings) -> Iterator[str]:
    """What is wrong with the file or folder that DATASET_NAME names, in a sentence."""
    name = settings.dataset_name
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


def _slice(settings: Settings, rows: list[Placed]) -> list[Placed]:
    """The slice of a local file or folder, whose only split is `train`."""
    if _split(settings)["name"] != "train":
        raise SettingsError(
            f"DATASET_SPLIT={settings.dataset_split}: a file or folder has only the split train, for example DATASET_SPLIT=train[0:500]"
        )
    return [rows[index] for index in _range(settings, len(rows))]


def _split(settings: Settings) -> re.Match[str]:
    """DATASET_SPLIT, taken apart."""
    parsed = re.fullmatch(SPLIT, settings.dataset_split)
    assert parsed is not None  # checked by settings
    return parsed


def _range(settings: Settings, count: int) -> range:
    """The rows that the slice of DATASET_SPLIT takes out of `count`; bounds beyond the end mean the end."""
    parsed = _split(settings)

    def bound(text: str | None) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)

    return range(*slice(bound(parsed["start"]), bound(parsed["stop"])).indices(count))
