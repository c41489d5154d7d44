"""Where the rows come from, which of them are taken, and which are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import hub
from finetune.data import checks, reading
from finetune.data.formats import messages as conversation
from finetune.data.formats import template
from finetune.data.reading import Placed, Row
from finetune.errors import HubError, SettingsError, first_line
from finetune.settings import SPLIT, Settings

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN = 5  # bad rows named in one message
SAMPLES = Path(__file__).parent.parent / "samples"
COMMIT = "[0-9a-f]{40}"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that passed the checks. messages: whether they are in the `messages` form. seen, dropped: rows read, and left out.

    places: of each row, for messages. sha256: of their texts in order, so that equal data is known as equal.
    """

    name: str
    commit: str | None
    rows: list[Row]
    messages: bool
    seen: int
    dropped: int
    sha256: str
    places: list[str]

    def record(self) -> dict[str, Any]:
        """What run.json says of the data."""
        return dict(
            name=self.name,
            commit=self.commit,
            messages=self.messages,
            seen=self.seen,
            dropped=self.dropped,
            sha256=self.sha256,
        )


def on_hub(name: str) -> bool:
    """Whether DATASET_NAME is looked for on the Hub: it is neither the bundled rows nor a file."""
    a_file = name.lower().endswith(tuple(reading.READERS)) or name.startswith((".", "/", "~"))
    return name != "samples" and not a_file


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
    messages = "messages" in first and not set(first).issuperset(settings.completion_columns)
    columns = ("messages",) if messages else settings.prompt_columns + settings.completion_columns
    kept = (*columns, *conversation.NOT_YET) if messages else columns
    good, bad, places = [], [], []
    for where, row in found:
        if problem := _problem(row, columns, messages):
            bad.append(f"{where}: {problem}")
        else:
            good.append({column: row[column] for column in kept if column in columns or row.get(column)})
            places.append(where)
    refuse(bad, len(found), settings, f"every row needs text in {', '.join(columns)}")
    if not good:
        raise SettingsError(f"DATASET_NAME={name}: all {len(bad)} rows are malformed; the first is {bad[0]}")
    if not messages:
        template.template(settings)  # refused now, and not when a model has come down from the Hub
    digest = hashlib.sha256(json.dumps(good, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    return Rows(name, commit, good, messages, len(found), len(bad), digest, places)


def _problem(row: Any, columns: tuple[str, ...], messages: bool) -> str | None:
    """Why there is no training text in a row as it was read; None: there is."""
    if not isinstance(row, dict):
        return f"is {checks.kind(row)}, not an object"
    return conversation.problem(row) if messages else template.problem(row, columns)


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
    """The rows of the file that DATASET_NAME names, or the bundled ones of one language or both."""
    if settings.dataset_name == "samples":
        languages = [settings.dataset_config] if settings.dataset_config else ["en", "zh"]
        files = {f"samples/{language}.jsonl": SAMPLES / f"{language}.jsonl" for language in languages}
    else:
        files = {settings.dataset_name: Path(settings.dataset_name).expanduser()}
    for shown, file in files.items():
        for where, row in reading.rows(file, _wanted(settings)):
            yield f"{shown} {where}", row


def _from_hub(settings: Settings) -> tuple[str | None, list[Placed]]:
    from datasets import get_dataset_split_names, load_dataset
    from huggingface_hub import HfApi, constants

    name, config, token = settings.dataset_name, settings.dataset_config, hub.token(settings)
    split = str(re.fullmatch(SPLIT, settings.dataset_split)["name"])  # type: ignore[index]  # checked by settings
    commit: str | None = settings.dataset_revision
    with hub.explained("DATASET_NAME", settings):
        if not constants.is_offline_mode():
            commit = HfApi(token=token).dataset_info(name, revision=settings.dataset_revision).sha
        try:
            found = load_dataset(name, config, split=split, revision=commit, token=token)
        except ValueError as error:
            if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
                raise SettingsError(f"DATASET_CONFIG={config or ''}: {first_line(error)}") from None
            if "split" in str(error).lower():
                splits = ", ".join(get_dataset_split_names(name, config, revision=commit, token=token))
                raise SettingsError(f"DATASET_SPLIT={settings.dataset_split}: {name} has {splits}, for example DATASET_SPLIT={splits.split(',')[0]}") from None  # fmt: skip
            raise SettingsError(f"DATASET_NAME={name}: cannot be read as a data set ({first_line(error)})") from None
    if constants.is_offline_mode():
        commit = _taken_offline(found, settings.dataset_revision, name)
    names, which = found.column_names, _range(settings, len(found))
    # others may hold pictures or what Python cannot; one stays where none is wanted, for without columns there are no rows
    used = [column for column in names if column in _wanted(settings)] or names[:1]
    rows = found.select(which).select_columns(used)
    return commit, [
        (f"{name} {split} row {index + 1}", {**dict.fromkeys(names), **row})
        for index, row in zip(which, rows, strict=True)
    ]


def _taken_offline(found: Dataset, asked: str, name: str) -> str | None:
    """The commit that was loaded without the Hub; None: unknown. Raises HubError where it is not the one asked for.

    Offline, datasets takes the newest that it has, whatever revision is asked for; its folder tells which one that was.
    """
    taken = next((Path(file["filename"]).parent.name for file in found.cache_files), "")
    if not re.fullmatch(COMMIT, taken):
        return asked if re.fullmatch(COMMIT, asked) else None
    if re.fullmatch(COMMIT, asked) and taken != asked:
        raise HubError(
            f"DATASET_REVISION={asked}: is not in the cache, which has {taken} of {name}, and HF_HUB_OFFLINE is set; load it once "
            "with the network"
        )
    return taken


def missing(settings: Settings) -> Iterator[str]:
    """What is wrong with the file that DATASET_NAME names, in a sentence."""
    name = settings.dataset_name
    if name != "samples" and not on_hub(name):
        path = Path(name).expanduser()
        if path.suffix.lower() not in reading.READERS:
            yield (
                f"DATASET_NAME={name}: not a known kind of file; it takes {', '.join(reading.READERS)}, for example DATASET_NAME=rows.jsonl"
            )
        elif not path.is_file():
            yield f"DATASET_NAME={name}: there is no such file; give its path, in a container the one it is mounted at"


def _wanted(settings: Settings) -> set[str]:
    """Columns that rows may be made of."""
    return {"messages", *conversation.NOT_YET, *settings.prompt_columns, *settings.completion_columns}


def _slice(settings: Settings, rows: list[Placed]) -> list[Placed]:
    """The slice of a local file, whose only split is `train`."""
    parsed = re.fullmatch(SPLIT, settings.dataset_split)
    if parsed is None or parsed["name"] != "train":
        raise SettingsError(
            f"DATASET_SPLIT={settings.dataset_split}: a file has only the split train, for example DATASET_SPLIT=train[0:500]"
        )
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
