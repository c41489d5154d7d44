"""What goes into a run: the model's files, the rows, the tokens made of them. Known by their hashes, wherever they stand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import data, files, sources
from finetune.data import held_out
from finetune.errors import HubError, MachineError, SettingsError
from finetune.machine import permissions, preflight
from finetune.machine.gpus import Gpu
from finetune.run import folder
from finetune.run.identity import HELD_OUT, MODEL_FILE, inputs
from finetune.run.record import Record
from finetune.settings import Settings
from finetune.sources import local
from finetune.sources.model import Source
from finetune.weights.parameters import parameters

if TYPE_CHECKING:
    from finetune.data import Rows, Tokens


def look(settings: Settings, visible: list[Gpu], environ: Mapping[str, str]) -> list[str]:
    """Lines on this machine and on the files that settings name, before anything is downloaded.

    Raises MachineError, or SettingsError where a file is missing, with all that is wrong.
    """
    files.temporary()
    if closed := list(permissions.closed(settings)):
        raise MachineError(*closed)  # nothing more can be said of a model that cannot be read
    count: int | None = None
    damaged: Sequence[str] = ()
    try:
        count = parameters(Source(settings.model_name, None, Path(settings.model_name).expanduser()))
    except MachineError as error:
        damaged = error.problems
    lines = preflight.check(settings, visible, environ, count, list(missing(settings)), damaged)
    return [*lines, held_out.expected(settings)]


def missing(settings: Settings) -> Iterator[str]:
    """What is wrong with the files and folders that settings name, in sentences, before anything is read or downloaded."""
    yield from folder.inputs(settings)
    if problem := local.missing(settings):
        yield problem
    yield from data.held_rows.missing(settings)
    yield from data.formats.template.missing(settings)


def from_hub(settings: Settings) -> bool:
    """Whether the Hub is asked for the model or for rows. A run that needs nothing of it does not ask whose HF_TOKEN is."""
    names = [settings.dataset_name, settings.eval_dataset_name if settings.eval_rows else None]
    return not os.path.isdir(Path(settings.model_name).expanduser()) or any(data.on_hub(name) for name in names if name)


def check(source: Source, rows: Rows, tokens: Tokens, wanted: Record | None) -> dict[str, Any]:
    """Name -> sha256 (or commit) of all that goes in.

    wanted: the run.json whose inputs these must be. Raises SettingsError that names each input that differs, and its setting.
    """
    found = inputs(source.commit, source.digests, rows.sha256, tokens.sha256)
    more = {"date": tokens.date} if tokens.date else {}
    if tokens.held_out and tokens.held_out.rows:
        more[HELD_OUT] = tokens.held_out.sha256
    if wanted is None:
        return found | more
    model, dataset = wanted["model"], wanted["dataset"]
    recorded = inputs(model["commit"], model["files"], dataset["sha256"], dataset["tokens_sha256"])
    recorded["commit"] = found["commit"]  # equal files are the same model, whatever holds them
    differ = [name for name in sorted({*recorded, *found}) if recorded.get(name) != found.get(name)]
    if differ:
        # tokens are made of model and rows: if those differ, other tokens say nothing more
        named = [name for name in differ if name != "tokens"] or differ
        raise SettingsError(*(_sentence(name, recorded.get(name), found.get(name), source, rows) for name in named))
    return found | more


def _sentence(name: str, recorded: str | None, found: str | None, source: Source, rows: Rows) -> str:
    was = f"sha256 {(recorded or 'none')[:12]} recorded, {(found or 'none')[:12]} here"
    if name.startswith(MODEL_FILE):
        return (
            f"MODEL_NAME={source.name}: {name.removeprefix(MODEL_FILE)} is not that of the recorded run ({was}); give the same "
            "model, for example MODEL_NAME=/where/it/is/now"
        )
    if name == "rows":
        return (
            f"DATASET_NAME={rows.name}: these are not the rows of the recorded run ({was}); give the same ones, for example "
            "DATASET_NAME=/where/they/are/now.jsonl"
        )
    return (
        f"tokens: rows and model are those of the recorded run, but the tokens made of them are not ({was}); "
        "the reason is another text in the file PROMPT_TEMPLATE, another MAX_SEQ_LENGTH or TRAIN_ON, or another version of tokenizers"
    )


def base(record: Record, settings: Settings) -> tuple[Source | None, str]:
    """The base of the recorded run on this machine, or None and why not.

    Where the recorded name is not on this machine, a MODEL_NAME other than the default says where the model is now.
    """
    now = settings.model_name
    names = [record["settings"]["MODEL_NAME"], *([now] if now != Settings.model_name else [])]
    reasons = []
    for name in dict.fromkeys(names):
        source = sources.cached(name, record["model"]["commit"])
        if source is None:
            reasons.append(f"the base {name} is not on this machine")
            continue
        try:
            found = source.digests
        except (SettingsError, HubError) as error:
            reasons.append(str(error))
            continue
        recorded = record["model"]["files"]
        if found == recorded:
            return source, ""
        differ = sorted(file for file in {*found, *recorded} if found.get(file) != recorded.get(file))
        reasons.append(f"{name} is no longer the base of this run ({', '.join(differ)})")
    return None, "; ".join(reasons) + ". MODEL_NAME says where it is"
