"""`reproduce RUN_JSON`: a recorded run made again in a folder of its own, and what came of it held against the record.

Settings come from the record and from the command line, and from nowhere else: a LEARNING_RATE left in the environment must
not train another model under the same name. Of the environment and .env only the secrets and the libraries' own variables
count (caches, endpoint, GPU), except those that change numbers, which come from the record too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune import environment as libraries
from finetune.errors import NotReproduced, SettingsError
from finetune.run import records
from finetune.settings import Settings, declarations

# about this run and not about the recorded one: where it goes, and that nothing is published or tracked
OWN = {"OUTPUT_DIR", "OVERWRITE", "TOLERANCE", "PUSH_TO_HUB", "HUB_MODEL_ID", "HUB_MERGED_MODEL_ID", "REPORT_TO"}
# where inputs stand; what they are is known by their hashes
PLACES = {"MODEL_NAME", "MODEL_REVISION", "DATASET_NAME", "DATASET_REVISION", "PROMPT_TEMPLATE", "ENGINE"}


def read(path: Path) -> tuple[Path, dict[str, Any]]:
    """The run.json at `path`, or in the folder `path`. Raises SettingsError with all that keeps it from being reproduced."""
    path = path / "run.json" if path.is_dir() else path
    try:
        record = records.read(path)
    except FileNotFoundError:
        raise SettingsError(
            f"{path}: there is no such file; give the record of a finished run, for example: reproduce outputs/run.json"
        ) from None
    known = {d.name for d in declarations() if not d.secret}
    if odd := sorted(name for name in record["settings"] if name not in known):
        raise SettingsError(
            f"{path}: settings holds {', '.join(odd)}. A run writes no secret and no file that holds one into its record, and this "
            "program has no other such setting. Take a copy as a run wrote it, or use the program that wrote it; a secret is given "
            "in the environment, for example HF_TOKEN"
        )
    if not weights(record):
        raise SettingsError(
            f"{path}: files holds no weights (adapter/ or merged/), so there is nothing to compare with"
        )
    if not record["training"]["losses"]:
        raise SettingsError(f"{path}: training.losses is empty; take a copy as a run wrote it")
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
    if not record["environment"].get("gpu"):
        kept["OMP_NUM_THREADS"] = str(record["environment"]["cpu_threads"])  # sums are split by it
    settings = {name: _text(value) for name, value in record["settings"].items() if name not in OWN}
    settings["ENGINE"] = record["engine"]["name"]
    for section, name in (("model", "MODEL_REVISION"), ("dataset", "DATASET_REVISION")):
        settings[name] = record[section]["commit"] or settings.get(name, "")
    original = path.absolute().parent
    beside = original.with_name(f"{original.name}-reproduced") if path.name == "run.json" else original / f"{path.stem}-reproduced"  # fmt: skip
    settings["OUTPUT_DIR"] = str(beside)
    restored = {**settings, **line}
    # as the run will have it: without quotes and ~, or the default
    given = Settings.from_env({}, {"OUTPUT_DIR": restored["OUTPUT_DIR"]}).output_dir
    output, place = Path(given).resolve(), original.resolve()
    # a record under another name lies in a folder of records, and not in that of its run
    if output == place or (path.name == "run.json" and output.is_relative_to(place)):
        raise SettingsError(
            f"OUTPUT_DIR={given}: is the folder of the recorded run or lies in it, and that stays as it is; give "
            f"another one, for example OUTPUT_DIR={beside}"
        )
    return kept, restored


def _text(value: Any) -> str:
    """A recorded value as it is written in the environment. Quotes keep a text as it is."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "" if value is None else f'"{value}"' if isinstance(value, str) else str(value)


def run(path: Path, settings: Settings, environ: Mapping[str, str]) -> None:
    """Make the run of `path` again with `settings`, as `restore` gave them, and compare.

    Raises SettingsError where model or data are not those of the record, NotReproduced where the bytes differ and no
    TOLERANCE covers the losses' difference.
    """
    from finetune.run import folder, recipe

    path, recorded = read(path)
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


def weights(record: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of each file of adapter or merged weights."""
    names = (
        name for name in record["files"] if name.startswith(("adapter/", "merged/")) and name.endswith(".safetensors")
    )
    return {name: record["files"][name]["sha256"] for name in names}


def judge(path: Path, recorded: Mapping[str, Any], made: Mapping[str, Any], tolerance: float | None) -> str:
    """What is said where the run was reproduced, or came close enough. Raises NotReproduced after printing the differences."""
    old, new = weights(recorded), weights(made)
    parts = {name.split("/")[0] for name in old} & {name.split("/")[0] for name in new}
    compared = sorted(name for name in {*old, *new} if name.split("/")[0] in parts)
    differ = [name for name in compared if old.get(name) != new.get(name)]
    lines = [*table(differences(recorded, made))]
    for name in sorted({"adapter", "merged"} - parts):
        lines.append(f"{name} weights: only in {'the record' if any(n.startswith(name) for n in old) else 'this run' if any(n.startswith(name) for n in new) else 'neither'}, not compared")  # fmt: skip
    if not differ:
        if lines:
            lines.insert(0, "different here, without effect on the weights:")
        hashes = [f"  {name:45} sha256 {old[name]}" for name in compared]
        return "\n".join([*lines, f"REPRODUCED: {path}", *hashes])
    lines += [f"{name}: recorded {old.get(name, 'none')[:16]}, here {new.get(name, 'none')[:16]}" for name in differ]
    apart, largest = losses(recorded["training"]["losses"], made["training"]["losses"])
    lines += apart
    others = [name for name, *_ in differences(recorded, made) if name.startswith(("setting ", "engine name"))]
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
    apart = [(abs(a - b) / max(abs(a), abs(b)), step) for step, (a, b) in enumerate(zip(old, new, strict=False), 1) if a != b]  # fmt: skip
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


def differences(recorded: Mapping[str, Any], made: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, recorded, here) of all that may decide the weights and is not the same in both records."""
    return [
        (name, _shown(old), _shown(new)) for name, old, new in _pairs(dict(_facts(recorded)), dict(_facts(made))) if old != new
    ]  # fmt: skip


def _pairs(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in [*old, *(name for name in new if name not in old)]:
        yield name, old.get(name), new.get(name)


def _facts(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All that may decide the weights, each under its name, the likeliest reasons first."""
    free = {d.name for d in declarations() if d.free}
    yield from ((f"engine {key}", value) for key, value in record["engine"].items() if key != "reason")
    for name, value in record["settings"].items():
        if name not in free | PLACES:
            yield f"setting {name}", value
    for section in ("model", "dataset"):
        yield f"{section} commit", record[section]["commit"]
    for name, value in record["environment"].items():
        if isinstance(value, dict):
            yield from ((f"{name.rstrip('s')} {key}", inner) for key, inner in value.items())
        else:
            yield name, value


def table(rows: list[tuple[str, str, str]]) -> list[str]:
    """The differences as lines in three columns."""
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return [f"  {name:{widths[0]}}  {old:{widths[1]}}  {new}" for name, old, new in rows]


def _shown(value: Any) -> str:
    return "none" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
