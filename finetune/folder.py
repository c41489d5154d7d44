"""OUTPUT_DIR: what is there from an earlier run, whether it is the same run, and whether it is still whole."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune import files, preflight, records
from finetune.errors import PreflightError, SettingsError
from finetune.report import below, versions
from finetune.settings import Settings

PRODUCTS = ("adapter", "merged", "checkpoints", "run.json", "metrics.jsonl", "curves.png", "report.html", "samples.md", "README.md")  # fmt: skip
IDENTITY = "checkpoints/identity.json"


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """`output` for this process alone, for a while. Raises PreflightError where another run is writing there.

    Two runs in one folder take each other's checkpoints for their own. A file system that knows no locks is not asked twice.
    """
    fresh = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    held = [os.open(output, os.O_RDONLY)]

    def let_go() -> None:
        """A forked child may outlive this process (one that tokenizes, after SIGKILL) and must not keep the lock."""
        for handle in held:
            os.close(handle)

    os.register_at_fork(after_in_child=let_go)
    try:
        fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PreflightError(
            f"OUTPUT_DIR={output}: another run is writing there. Wait until it has ended, or give another folder, for example "
            f"OUTPUT_DIR={output}-2"
        ) from None
    except OSError:
        pass
    try:
        with files.told(output):
            yield
    finally:
        os.close(held.pop())
        if fresh:
            with contextlib.suppress(OSError):  # there is something in it
                output.rmdir()


def begin(settings: Settings, output: Path, identity: Mapping[str, Any]) -> bool:
    """Whether this very run is complete in `output`, with all that is asked for. Nothing is changed there.

    identity: of this run. Raises SettingsError with the differences where `output` holds another run, unless OVERWRITE is set.
    """
    if settings.overwrite:
        return False
    complete, place = (output / "run.json").is_file(), output / IDENTITY
    if place.is_file():
        try:
            before = dict(json.loads(place.read_bytes()))
        except (ValueError, TypeError) as error:
            raise SettingsError(
                f"{place}: cannot be read ({error}); give another OUTPUT_DIR, or OVERWRITE=1 to replace the run in this one"
            ) from None
        different = [k for k in sorted({*before, *identity}) if before.get(k) != identity.get(k)]
        if different:
            raise SettingsError(
                *(f"{k}: was {before.get(k, 'unset')}, is now {identity.get(k, 'unset')}" for k in different),
                f"OUTPUT_DIR={output}: holds {'a complete' if complete else 'an unfinished'} run with other settings. Give those "
                "again to go on with it, another OUTPUT_DIR to keep it, or OVERWRITE=1 to replace it.",
            )
        asked = dict(adapter=settings.save_adapter, merged=settings.save_merged)
        if lacking := [name for name, wanted in asked.items() if complete and wanted and not (output / name).is_dir()]:
            print(f"{output}: this run is complete but for {' and '.join(lacking)}, which is made now", flush=True)
        return complete and not lacking
    if there := [name for name in PRODUCTS if (output / name).exists() and (output / name) != place.parent]:
        raise SettingsError(
            f"OUTPUT_DIR={output}: already holds {', '.join(there)}; give another folder, or OVERWRITE=1 to replace them"
        )
    return False


def day(settings: Settings, output: Path, recorded: Mapping[str, Any] | None) -> datetime.date:
    """What a chat template that writes today's date writes in this run: the recorded run's, that of the run which goes on, or today."""
    if recorded is not None:
        return day_of(recorded)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if not settings.overwrite:
            return day_of({"dataset": json.loads((output / IDENTITY).read_bytes())})
    return datetime.date.today()


def day_of(record: Mapping[str, Any]) -> datetime.date:
    """The date that the chat template of a recorded run wrote; today where it wrote none."""
    try:
        return datetime.date.fromisoformat(record["dataset"]["date"])
    except (KeyError, ValueError, TypeError):
        return datetime.date.today()


def identity(settings: Settings, decides: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run this one: settings, versions, and what `decides` names beside them: engine, and all that goes in."""
    return {**settings.deciding(), **decides, **{f"version of {k}": v for k, v in versions().items()}}


def claim(settings: Settings, output: Path, identity: Mapping[str, Any]) -> None:
    """Make `output` this run's. With OVERWRITE the old run goes now, when all that can refuse the new one has been asked."""
    # where it is, the run counts as complete: not from here on, also where only the merged weights were lacking
    (output / "run.json").unlink(missing_ok=True)
    if settings.overwrite:
        for name in (*PRODUCTS, *(f"{name}.partial" for name in PRODUCTS)):
            path = output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (output / IDENTITY).parent.mkdir(parents=True, exist_ok=True)
    files.write_json(output / IDENTITY, identity)


def finished(output: Path) -> dict[str, Any]:
    """The record of the complete run in `output`.

    Raises SettingsError where there is none, or it is damaged, PreflightError that names each file of it that may not be read.
    """
    try:
        record = records.read(output / "run.json")
    except FileNotFoundError:
        raise SettingsError(
            f"OUTPUT_DIR={output}: holds no finished run (no run.json); train first, or give the folder of a run"
        ) from None
    if closed := [problem for name in sorted(record["files"]) if (problem := preflight.denied(output / name))]:
        raise PreflightError(*closed)
    return record


def verify(output: Path) -> dict[str, Any]:
    """The record of the run in `output`, after every file was found to have the sha256 that the record says.

    Raises SettingsError that names each missing, changed or added file. Reads in small pieces; needs no GPU.
    """
    record = finished(output)
    expected = record["files"]
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
