"""The rows that are held out of training: of the split that is trained, or from elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from finetune.data import formats, held_out, locate, origin
from finetune.data.checked import kept, refuse
from finetune.data.held_out import Places
from finetune.data.origin import Origin, Placed
from finetune.data.reading import Row
from finetune.errors import SettingsError
from finetune.settings import Settings


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


def places(settings: Settings, source: Origin) -> Places:
    """Which rows of a source are trained, and which are held out. Rows are only counted as far as is needed to know."""
    split, spare = settings.dataset_split, held_out.SPARE * settings.eval_rows
    inside = bool(settings.eval_rows) and not held_out.elsewhere(settings)
    last = origin.end(split)
    if inside and settings.eval_split != "auto":
        last = None
    count = source.count(None if last is None else last + spare * inside)
    trained = origin.taken(split, count)
    if not inside:
        return Places(trained, [])
    if settings.eval_split == "auto":
        return held_out.choose(trained, count, settings)
    found = held_out.named(trained, origin.taken(settings.eval_split, count), settings)
    if not found.held:
        raise SettingsError(
            f"EVAL_SPLIT={settings.eval_split}: names no rows beside those of DATASET_SPLIT={settings.dataset_split}, which are trained; "
            "name others, for example EVAL_SPLIT=train[500:564], or EVAL_ROWS=0"
        )
    return found


def of_split(settings: Settings, source: Origin, where: Places) -> dict[str, Any]:
    """The rows that are held out of the split that is trained, as a store keeps them: see `again`."""
    return _checked(origin.chosen(source, where.held), source, where.strict, settings)


def again(settings: Settings, source: Origin, stored: dict[str, Any]) -> Held | None:
    """The held-out rows that a store keeps, or those from elsewhere; None: none are asked for."""
    if not settings.eval_rows:
        return None
    if held_out.elsewhere(settings):
        return held_elsewhere(settings)
    return _told(settings.dataset_name, source, stored)


def held_elsewhere(settings: Settings) -> Held:
    """The rows that EVAL_DATASET_NAME and EVAL_SPLIT name, whatever is trained. Raises SettingsError where there are none, or bad ones."""
    there = held_out.measured(settings)
    with held_out.named_by_its_setting(settings):
        source = origin.of(there)
        last = origin.end(there.dataset_split)
        taken = origin.taken(there.dataset_split, source.count(last))
        wanted = min(len(taken), held_out.SPARE * settings.eval_rows)
        found = [*itertools.islice(source.rows(taken.start), wanted)]
        if not found:
            raise SettingsError(
                f"DATASET_SPLIT={there.dataset_split}: {there.dataset_name} holds no rows there; name others, for example "
                "DATASET_SPLIT=train[500:564]"
            )
        return _told(there.dataset_name, source, _checked(found, source, True, there))


def _checked(found: list[Placed], source: Origin, strict: bool, settings: Settings) -> dict[str, Any]:
    stored: dict[str, Any] = dict(rows=[], format="", dropped=0, at=[], strict=strict)
    if not found:
        return stored
    form = formats.choose(next((read.row for _, read in found if isinstance(read.row, dict)), {}), settings)
    bad = []
    for file, read in found:
        row = kept(form, read.row, settings)
        if isinstance(row, str):
            bad.append(f"{source.told(file, read.number, read.line)}: {row}")
        else:
            stored["rows"].append(row)
            stored["at"].append((file, read.number, read.line))
    if strict:
        refuse(bad, len(bad), len(found), settings, "held-out rows need what trained rows need")
    return {**stored, "format": form.NAME, "dropped": len(bad)}


def _told(name: str, source: Origin, stored: dict[str, Any]) -> Held:
    places = [source.told(*at) for at in stored["at"]]
    return Held(name, stored["rows"], stored["format"], stored["dropped"], places, stored["strict"])


def missing(settings: Settings) -> Iterator[str]:
    """What is wrong with the files or folders that DATASET_NAME and EVAL_DATASET_NAME name, in sentences."""
    yield from locate.missing(settings)
    if settings.eval_rows and settings.eval_dataset_name not in (None, settings.dataset_name):
        try:
            with held_out.named_by_its_setting(settings):
                if problems := [*locate.missing(held_out.measured(settings))]:
                    raise SettingsError(*problems)
        except SettingsError as error:
            yield from error.problems
