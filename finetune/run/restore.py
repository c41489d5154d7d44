"""The settings of a recorded run, with which `reproduce` makes it again.

They come from the record and from the command line, and from nowhere else: a LEARNING_RATE left in the environment must not
train another model under the same name. Of the environment and .env only the secrets and the libraries' own variables count
(caches, endpoint, GPU), except those that change numbers, which come from the record too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune import environment as libraries
from finetune.errors import SettingsError
from finetune.run import record as records
from finetune.run.record import Record
from finetune.settings import Settings, declarations, text

# about this run and not about the recorded one: where it goes, and that nothing is published or tracked
OWN = {"OUTPUT_DIR", "OVERWRITE", "TOLERANCE", "PUSH_TO_HUB", "HUB_MODEL_ID", "HUB_MERGED_MODEL_ID", "REPORT_TO"}


def read(path: Path) -> tuple[Path, Record]:
    """The run.json at `path`, or in the folder `path`. Raises SettingsError with all that keeps it from being reproduced."""
    path = path / "run.json" if path.is_dir() else path
    try:
        record = records.read(path, SettingsError)
    except FileNotFoundError:
        raise SettingsError(
            f"{path}: there is no such file; give the record of a finished run, for example: reproduce outputs/run.json"
        ) from None
    if not records.weights(record):
        raise SettingsError(f"{path}: the record lists no weights (adapter/ or merged/), so nothing can be compared")
    return path, record


def restore(path: Path, layered: Mapping[str, str], line: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Environment and command line with which the recorded run is made again; `line` wins over the record.

    Raises SettingsError where the record cannot be used, or where something would be published, or overwritten.
    """
    path, record = read(path)
    if line.get("PUSH_TO_HUB", "0").strip().lower() not in ("", "0", "false", "no", "off"):
        raise SettingsError(
            "PUSH_TO_HUB: reproduce publishes nothing; compare first, and then: push OUTPUT_DIR=… HUB_MODEL_ID=…"
        )
    names = {d.name for d in declarations() if not d.secret}
    left_out = sorted(names & {name for name, value in layered.items() if value})
    if left_out:
        print(f"not taken from the environment or .env, but from the record: {', '.join(left_out)}", flush=True)
    kept = {name: value for name, value in layered.items() if name not in names and name not in libraries.NUMERIC}
    kept |= {
        name: str(value) for name, value in record["environment"]["variables"].items() if name in libraries.NUMERIC
    }
    if not record["environment"]["gpu"]:
        kept["OMP_NUM_THREADS"] = str(record["environment"]["cpu_threads"])  # sums are split by it
    recorded = {**records.OLDER, **record["settings"]}
    settings = {name: _written(value) for name, value in recorded.items() if name not in OWN}
    settings["ENGINE"] = record["engine"]["name"]
    settings["MODEL_REVISION"] = record["model"]["commit"] or settings.get("MODEL_REVISION", "")
    settings["DATASET_REVISION"] = record["dataset"]["commit"] or settings.get("DATASET_REVISION", "")
    original = path.absolute().parent
    # a record under another name lies in a folder of records, and not in that of its run; / is nobody's run
    of_run = path.name == "run.json" and original.name != ""
    beside = original.with_name(f"{original.name}-reproduced") if of_run else original / f"{path.stem}-reproduced"
    settings["OUTPUT_DIR"] = str(beside)
    restored = {**settings, **line}
    # as the run will have it: without quotes and ~, or the default
    given = Settings.from_env({}, {"OUTPUT_DIR": restored["OUTPUT_DIR"]}).output_dir
    output, place = Path(given).resolve(), original.resolve()
    if output == place or (of_run and output.is_relative_to(place)):
        raise SettingsError(
            f"OUTPUT_DIR={given}: is the recorded run's folder or lies inside it. That folder is never changed; "
            f"give another one, for example OUTPUT_DIR={beside}"
        )
    return kept, restored


def _written(value: Any) -> str:
    """A recorded value as it is written in the environment. Quotes keep a text as it is."""
    return f'"{value}"' if isinstance(value, str) else text(value)
