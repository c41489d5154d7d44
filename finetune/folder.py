"""OUTPUT_DIR: what is there from an earlier run, whether it is the same run, and whether it is still whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune import files
from finetune.errors import SettingsError
from finetune.report import below, versions
from finetune.settings import Settings

PRODUCTS = ("adapter", "merged", "checkpoints", "run.json", "metrics.jsonl", "curves.png", "report.html", "samples.md", "README.md")  # fmt: skip


def begin(settings: Settings, output: Path, decides: Mapping[str, Any]) -> bool:
    """Make `output` ready for a run; True where this very run is complete there already.

    decides: what decides the weights beside the settings: engine, and all that went in. Raises SettingsError with the differences
    where `output` holds another run, unless OVERWRITE is set.
    """
    identity = {**settings.deciding(), **decides, **{f"version of {k}": v for k, v in versions().items()}}
    place = output / "checkpoints" / "identity.json"
    complete = (output / "run.json").is_file()
    if settings.overwrite:
        for name in (*PRODUCTS, *(f"{name}.partial" for name in PRODUCTS)):
            path = output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif place.is_file():
        before = json.loads(place.read_text())
        different = [k for k in sorted({*before, *identity}) if before.get(k) != identity.get(k)]
        if different:
            raise SettingsError(
                *(f"{k}: was {before.get(k, 'unset')}, is now {identity.get(k, 'unset')}" for k in different),
                f"OUTPUT_DIR={output}: holds {'a complete' if complete else 'an unfinished'} run with other settings. Give those "
                "again to go on with it, another OUTPUT_DIR to keep it, or OVERWRITE=1 to replace it.",
            )
        return complete
    elif there := [name for name in PRODUCTS if (output / name).exists() and (output / name) != place.parent]:
        raise SettingsError(
            f"OUTPUT_DIR={output}: already holds {', '.join(there)}; give another folder, or OVERWRITE=1 to replace them"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(place, identity)
    return False


def finished(output: Path) -> dict[str, Any]:
    """The record of the complete run in `output`. Raises SettingsError where there is none."""
    try:
        record: dict[str, Any] = json.loads((output / "run.json").read_text())
        if not isinstance(record, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        raise SettingsError(
            f"OUTPUT_DIR={output}: holds no finished run (no run.json); train first, or give the folder of a run"
        ) from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{output / 'run.json'}: cannot be read ({error})") from None
    return record


def verify(output: Path) -> dict[str, Any]:
    """The record of the run in `output`, after every file was found to have the sha256 that the record says.

    Raises SettingsError that names each missing, changed or added file. Reads in small pieces; needs no GPU.
    """
    record = finished(output)
    expected = record.get("files")
    if not isinstance(expected, dict):
        raise SettingsError(f"{output / 'run.json'}: has no list of files; take a copy as the run wrote it")
    problems = [f"{output / name}: is missing" for name in expected if not (output / name).is_file()]
    there = {name: (output / name).stat().st_size for name in expected if (output / name).is_file()}
    for name, size in there.items():
        if size != expected[name]["bytes"]:
            problems.append(f"{output / name}: has {size:,} bytes, the run wrote {expected[name]['bytes']:,}")
    same_size = [name for name, size in there.items() if size == expected[name]["bytes"]]
    for name, found in files.digests(output, same_size).items():
        if found != expected[name]["sha256"]:
            problems.append(f"{output / name}: is not the file that the run wrote (its sha256 differs)")
    # what lies beside the weights is loaded and published with them
    problems += [f"{output / name}: is not of this run" for name in below(output) if name not in expected]
    if problems:
        raise SettingsError(
            *problems, f"OUTPUT_DIR={output}: is not whole; take a copy that is, or train again with OVERWRITE=1"
        )
    return record
