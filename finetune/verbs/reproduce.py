"""`reproduce RUN_JSON`: make a recorded run again in a folder of its own, and compare the result with the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import NotReproduced, SettingsError
from finetune.run import folder, recipe, restore
from finetune.run.record import OLDER, Record, shown, weights
from finetune.settings import Settings, declarations

# where inputs stand; what they are is known by their hashes
PLACES = {"MODEL_NAME", "MODEL_REVISION", "DATASET_NAME", "DATASET_REVISION", "PROMPT_TEMPLATE", "ENGINE"}


def run(settings: Settings, environ: Mapping[str, str], word: str) -> None:
    """Make the run of the record again with `settings`, which `restore` made of it, and compare.

    Raises SettingsError where model or data are not those of the record, NotReproduced where the bytes differ and no
    TOLERANCE covers the losses' difference.
    """
    path, recorded = restore.read(Path(word))
    output = Path(settings.output_dir)
    kept = {part for part, made in (("adapter", settings.save_adapter), ("merged", settings.save_merged)) if made}
    if not kept & {name.split("/")[0] for name in weights(recorded)}:
        raise SettingsError(
            f"{path}: holds the hashes of {', '.join(sorted(weights(recorded)))}, and SAVE_ADAPTER and SAVE_MERGED are set so "
            "that none of these is made; leave them as recorded"
        )
    print(f"reproducing {path} in {output}", flush=True)
    was_whole = (output / "run.json").is_file()
    recipe.run(settings, environ, recorded)
    made = folder.verify(output) if was_whole else folder.finished(output)
    print(judge(path, recorded, made, settings.tolerance), flush=True)


def judge(path: Path, recorded: Record, made: Record, tolerance: float | None) -> str:
    """The text to print if the run was reproduced or came close enough. If not, print the differences and raise NotReproduced."""
    old, new = weights(recorded), weights(made)
    parts = {name.split("/")[0] for name in old} & {name.split("/")[0] for name in new}
    compared = sorted(name for name in {*old, *new} if name.split("/")[0] in parts)
    differ = [name for name in compared if old.get(name) != new.get(name)]
    found = differences(recorded, made)
    lines = table(found)
    for name in sorted({"adapter", "merged"} - parts):
        of_record, of_this = (any(n.startswith(name) for n in side) for side in (old, new))
        where = "the record" if of_record else "this run" if of_this else "neither"
        lines.append(f"{name} weights: only in {where}, not compared")
    if not differ:
        if lines:
            lines.insert(0, "different here, without effect on the weights:")
        hashes = [f"  {name:45} sha256 {old[name]}" for name in compared]
        return "\n".join([*lines, f"REPRODUCED: {path}", *hashes])
    lines += [f"{name}: recorded {old.get(name, 'none')[:16]}, here {new.get(name, 'none')[:16]}" for name in differ]
    apart, largest = losses(recorded["training"]["losses"], made["training"]["losses"])
    lines += apart
    others = [name for name, *_ in found if name.startswith(("setting ", "engine name"))]
    if tolerance is not None and not others and largest is not None and largest <= tolerance:
        lines.append(
            f"WITHIN TOLERANCE={tolerance:g}: the bytes differ, the losses differ by {largest:.2g} at most: {path}"
        )
        return "\n".join(lines)
    print("differences (recorded, here):", *lines, sep="\n", flush=True)
    if tolerance is not None and others:
        raise NotReproduced(
            f"{path}: not reproduced; TOLERANCE is for other hardware, and here settings or the engine differ (above)"
        )
    raise NotReproduced(f"{path}: not reproduced; what differs stands above")


def losses(old: list[float], new: list[float]) -> tuple[list[str], float | None]:
    """Sentences on where two courses of the loss part, and their largest relative difference; None: not comparable."""
    pairs = enumerate(zip(old, new, strict=False), 1)
    apart = [(abs(a - b) / max(abs(a), abs(b)), step) for step, (a, b) in pairs if a != b]
    said = []
    if apart:
        relative, step = apart[0]
        most, at = max(apart)
        said.append(
            f"losses: first difference at step {step}: recorded {old[step - 1]:.9g}, here {new[step - 1]:.9g}, relative difference "
            f"{relative:.2g}; the largest of {len(old)} steps is {most:.2g}, at step {at}"
        )
    if len(old) != len(new):
        return [*said, f"losses: {len(old)} steps recorded, {len(new)} here"], None
    return said or [f"losses: equal in all {len(old)} steps"], max(apart, default=(0.0, 0))[0]


def differences(recorded: Record, made: Record) -> list[tuple[str, str, str]]:
    """(name, recorded, here) of all that may decide the weights and is not the same in both records."""
    old, new = dict(_facts(recorded)), dict(_facts(made))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [(name, shown(old.get(name)), shown(new.get(name))) for name in names]


def _facts(record: Record) -> Iterator[tuple[str, Any]]:
    """All that may decide the weights, each under its name, the likeliest reasons first."""
    free = {d.name for d in declarations() if d.free}
    yield from ((f"engine {key}", value) for key, value in record["engine"].items() if key != "reason")
    known = (d for d in declarations() if not (d.secret or d.unless))
    newer = {d.name: list(d.default) if isinstance(d.default, tuple) else d.default for d in known}  # than the record
    for name, value in {**newer, **OLDER, **record["settings"]}.items():
        if name not in free | PLACES:
            yield f"setting {name}", value
    yield "model commit", record["model"]["commit"]
    yield "dataset commit", record["dataset"]["commit"]
    for name, value in record["environment"].items():
        if isinstance(value, dict):
            yield from ((f"{name.rstrip('s')} {key}", inner) for key, inner in value.items())
        else:
            yield name, value


def table(rows: list[tuple[str, str, str]]) -> list[str]:
    """The differences as lines in three columns."""
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return [f"  {name:{widths[0]}}  {old:{widths[1]}}  {new}" for name, old, new in rows]
