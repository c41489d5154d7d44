"""OUTPUT_DIR: what is there from an earlier run, whether it is the same run, and whether it is still whole."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune import files
from finetune.data import opened
from finetune.errors import MachineError, OutputError, SettingsError
from finetune.machine import container
from finetune.machine.permissions import denied
from finetune.run import identity as identities
from finetune.run import record as records
from finetune.run.record import Record
from finetune.settings import Settings

PRODUCTS = ("adapter", "merged", "checkpoints", "run.json", "eval.json", *records.PAGES)
IDENTITY = "checkpoints/identity.json"
ASIDE = "replaced.partial"  # holds the old run until the run with OVERWRITE is in its place
ENDINGS = ("", ".partial", ".old")


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """`output` for this process alone, for a while. Raises MachineError where another run is writing there.

    Two runs in one folder would use each other's checkpoints. On a file system without locks the run goes on without one.
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
        raise MachineError(
            f"OUTPUT_DIR={output}: another run is writing there. Wait until it has ended, or give another folder, for example "
            f"{container.another(output)}"
        ) from None
    except OSError:
        pass
    try:
        with files.told(output):
            _settle(output)
            yield
    finally:
        os.close(held.pop())
        if fresh:
            with contextlib.suppress(OSError):  # there is something in it
                output.rmdir()


def begin(settings: Settings, output: Path, identity: Mapping[str, Any]) -> bool:
    """Whether this very run is complete in `output`, with all that is asked for. Nothing is changed there.

    identity: of this run. Without OVERWRITE: raises SettingsError with the differences where `output` holds another run, and
    OutputError if what it holds is damaged or not from a run.
    """
    if settings.overwrite:
        return False
    complete, place = (output / "run.json").is_file(), output / IDENTITY
    if place.is_file() or complete:
        before = _identity(output)
        different = [k for k in sorted({*before, *identity}) if before.get(k) != identity.get(k)]
        if different:
            raise SettingsError(
                *(f"{k}: was {before.get(k, 'unset')}, is now {identity.get(k, 'unset')}" for k in different),
                f"OUTPUT_DIR={output}: holds {'a complete' if complete else 'an unfinished'} run with other settings. Give those "
                "again to go on with it, another OUTPUT_DIR to keep it, or OVERWRITE=1 to replace it.",
            )
        asked = dict(adapter=settings.save_adapter, merged=settings.save_merged)
        if lacking := [name for name, wanted in asked.items() if complete and wanted and not (output / name).is_dir()]:
            print(f"{output}: this run is complete except for {' and '.join(lacking)}; making it now", flush=True)
        return complete and not lacking
    if there := [
        n for n in PRODUCTS if os.path.lexists(output / n) and not (n == "checkpoints" and place.parent.is_dir())
    ]:
        raise OutputError(
            f"OUTPUT_DIR={output}: already holds {', '.join(there)}; give another folder, or OVERWRITE=1 to replace them"
        )
    return False


def _identity(output: Path) -> dict[str, Any]:
    """That of the run in `output`; of a complete one whose checkpoints were removed, as its record has it."""
    place = output / IDENTITY
    way_out = "give another OUTPUT_DIR, or OVERWRITE=1 to replace the run in this one"
    try:
        if not place.is_file():
            return identities.of(records.read(output / "run.json", OutputError))
        return dict(json.loads(place.read_bytes()))
    except OutputError as error:
        raise OutputError(*error.problems, f"OUTPUT_DIR={output}: {way_out}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise OutputError(f"{place}: cannot be read ({error}); {way_out}") from None


def day(settings: Settings, output: Path, recorded: Mapping[str, Any] | None) -> datetime.date:
    """The date that a chat template writes as today's: the recorded run's, that of the run which is resumed, or today's."""
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


def claim(settings: Settings, output: Path, identity: Mapping[str, Any]) -> None:
    """Make `output` this run's. With OVERWRITE the old run is removed now, after every check that can refuse the new one.

    If it is killed at any moment, `_settle` later leaves either the whole old run or the new run, begun. Raises MachineError
    where something of the old run cannot be moved, with the old run as it was.
    """
    if not settings.overwrite:
        # with run.json the run counts as complete, and from here on it is not, even if only the merged weights are missing
        (output / "run.json").unlink(missing_ok=True)
        (output / IDENTITY).parent.mkdir(parents=True, exist_ok=True)
        return files.write_json(output / IDENTITY, identity)
    begun = output / "checkpoints"
    made = begun.with_name("checkpoints.partial")
    try:
        (output / ASIDE).mkdir()
        for name in _products():
            if os.path.lexists(output / name):
                _move(output / name, output / ASIDE / name)
        made.mkdir()
        files.write_json(made / Path(IDENTITY).name, identity)
        _move(made, begun)  # from here on it is the new run's folder
    except BaseException:
        _settle(output)
        raise
    _settle(output)


def _products() -> Iterator[str]:
    """Names that a run uses in its folder, with the names of unfinished and old files. `checkpoints` comes first: see `_settle`."""
    for name in sorted(PRODUCTS, key=lambda name: name != "checkpoints"):
        yield from (name + ending for ending in ENDINGS)


def _settle(output: Path) -> None:
    """Finish what a claim began, here or in a process that was killed: remove the old run, or put it back.

    The old run's `checkpoints` goes aside first and comes back last. So if there is one while other parts are aside, it is
    the new run's.
    """
    aside = output / ASIDE
    if not os.path.lexists(aside):
        return
    there = [name for name in _products() if os.path.lexists(aside / name)]
    if not (there and os.path.lexists(output / "checkpoints")):
        if there:
            files.remove(output / "checkpoints.partial")
        for name in reversed(there):
            _move(aside / name, output / name)
    try:
        files.remove(aside)
    except OSError as error:
        raise MachineError(
            f"{error.filename}: belongs to the replaced run and cannot be removed ({error.strerror}). Unmount it or "
            f"remove {aside} yourself, and start again with the same settings."
        ) from None


def _move(path: Path, to: Path) -> None:
    """Rename within the folder. Raises MachineError for what cannot be, such as a mount point."""
    try:
        os.rename(path, to)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY, errno.EEXIST):
            raise
        output = to.parent if path.parent.name == ASIDE else path.parent
        raise MachineError(
            f"{path}: cannot be moved to {to} ({error.strerror}), so the old run stays and no new one can take its place. Give "
            f"another folder, for example {container.another(output)}, or unmount {path.name} if it is a mount point"
        ) from None


def inputs(settings: Settings) -> Iterator[str]:
    """A sentence for each local input that a run in OUTPUT_DIR would replace, by whatever links one leads to the other."""
    output = Path(settings.output_dir)
    folders = _ways(output)
    products = {path for folder in folders for name in (*_products(), ASIDE) for path in _ways(Path(folder, name))}
    named = dict(
        MODEL_NAME=settings.model_name,
        DATASET_NAME=settings.dataset_name if settings.dataset_name != "samples" else None,
        EVAL_DATASET_NAME=settings.eval_dataset_name if settings.eval_dataset_name != "samples" else None,
        PROMPT_TEMPLATE=settings.template_file,
    )
    for variable, name in named.items():
        rows = variable.endswith("DATASET_NAME")
        found = [] if not name else opened.paths(name) if rows else [Path(name).expanduser()]
        for path in filter(os.path.lexists, found):
            if why := _replaced(path, rows, output, folders, products):
                yield f"{variable}={name}: {why}; give another folder for the run, for example {container.another(output)}"
                break


def _replaced(path: Path, rows: bool, output: Path, folders: set[str], products: set[str]) -> str | None:
    """Why an input at `path` would be replaced; None: it would not. folders, products: all ways to `output`, and to what a run writes there."""
    # a folder's rows include those in its data/, and metrics.jsonl would be one of those files
    ways = _ways(path) | (_ways(path / "data") if rows else set())
    inner = (
        sorted(p for p in (*path.iterdir(), *path.glob("data/*")) if os.path.islink(p)) if os.path.isdir(path) else []
    )
    within = {place for way in ways.union(*map(_ways, inner)) for place in (way, *map(str, Path(way).parents))}
    if within & products:
        return f"is inside a folder that a run in OUTPUT_DIR={output} replaces ({sorted(within & products)[0]})"
    return f"is OUTPUT_DIR={output} itself, where a run writes its own files" if ways & folders else None


def _ways(path: Path) -> set[str]:
    """The absolute paths by which `path` is reached: as it is named, with one link after the other followed, and the real one."""
    found, waiting = set[str](), [os.path.abspath(path)]
    while waiting and len(found) < 100:  # links can lead in circles
        at = Path(waiting.pop())
        if str(at) in found:
            continue
        found.add(str(at))
        for place in (at, *at.parents):
            if os.path.islink(place):
                target = os.path.join(os.path.realpath(place.parent), os.readlink(place), at.relative_to(place))
                waiting.append(os.path.normpath(target))
    return found | {os.path.realpath(path)}


def finished(output: Path) -> Record:
    """The record of the complete run in `output`.

    Raises OutputError where there is none, or it is damaged, MachineError that names each file of it that may not be read.
    """
    if os.path.lexists(output / ASIDE):
        with locked(output):
            pass
    try:
        record = records.read(output / "run.json", OutputError)
    except FileNotFoundError:
        raise OutputError(
            f"OUTPUT_DIR={output}: holds no finished run (no run.json); train first, or give the folder of a run"
        ) from None
    if closed := [problem for name in sorted(record["files"]) if (problem := denied(output / name))]:
        raise MachineError(*closed)
    return record


def verify(output: Path, part: str = "") -> Record:
    """The record of the run in `output`, after every file was found to have the sha256 that the record says.

    part: only this folder of it, such as adapter. Raises OutputError that names each missing, changed or added file. Reads in
    small pieces; needs no GPU.
    """
    record = finished(output)
    expected = {name: entry for name, entry in record["files"].items() if name.startswith(part)}
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
    problems += [
        f"{output / name}: is not of this run"
        for name in records.below(output)
        if name.startswith(part) and name not in expected
    ]
    if problems:
        raise OutputError(
            *problems, f"OUTPUT_DIR={output}: is not whole; take a copy that is, or train again with OVERWRITE=1"
        )
    return record
