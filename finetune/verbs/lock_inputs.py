"""`lock-inputs`: the commits that MODEL_REVISION and DATASET_REVISION name now, written into the env file."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from finetune import data, files, sources
from finetune import environment as libraries
from finetune.errors import HubError, MachineError, Refusal, SettingsError
from finetune.machine import container
from finetune.settings import Settings
from finetune.sources.local import url


def run(settings: Settings, environ: Mapping[str, str], _: str) -> None:
    for line in lock(settings, environ, Path(".env")):
        print(line, flush=True)


def lock(settings: Settings, environ: Mapping[str, str], path: Path) -> Iterator[str]:
    """Resolve both revisions and write them into the env file at `path`; lines that say what was done.

    Raises HubError, or SettingsError for a name that the Hub does not know, before anything is written; MachineError where
    `path` cannot be written.
    """
    found, refusals = {}, list[Refusal]()
    for name, revision, local in (
        ("MODEL_NAME", "MODEL_REVISION", os.path.exists(Path(settings.model_name).expanduser())),
        ("DATASET_NAME", "DATASET_REVISION", not data.on_hub(settings.dataset_name)),
    ):
        value = getattr(settings, name.lower())
        if problem := url(name, value):
            refusals.append(SettingsError(problem))
            continue
        if local:
            yield f"{name}={value}: is not on the Hub and has no revision; run.json records its sha256"
            continue
        try:
            found[revision] = sources.hub().commit(name, value, getattr(settings, revision.lower()), settings)
        except Refusal as refusal:
            refusals.append(refusal)
    if refusals:
        kind = next((type(r) for r in refusals if isinstance(r, HubError)), type(refusals[0]))
        raise kind(*(problem for r in refusals for problem in r.problems))
    if found:
        write(path, found)
    in_file = libraries.dotenv(path)
    for revision, commit in found.items():
        name, was = revision.replace("REVISION", "NAME"), getattr(settings, revision.lower())
        value = getattr(settings, name.lower())
        yield f"{path}: {revision}={commit} ({'as it was' if was == commit else f'{was} until now'}), of {value}"
        if environ.get(revision):
            yield f"note: {revision} is set in the environment too, and wins over {path}; unset it there"
        if value != (in_file.get(name) or getattr(Settings, name.lower())):
            yield f"note: {path} names another {name}, and this revision is of {value}; give {name} each time, or write it there"


def write(path: Path, values: Mapping[str, str]) -> None:
    """Set `values` in an env file and keep all else: comments, order, quotes, line ends, mode. Whole or not at all."""
    from dotenv.parser import parse_stream

    if container.image() and (why := container.lost(path.absolute().parent)):
        raise MachineError(
            f"{path.absolute()}: would go away with this container, since {why}. Call this in a folder of yours: "
            f'docker run -v "$PWD:/work" -w /work IMAGE lock-inputs. Or set {_set(values)} yourself.'
        )
    place = path.resolve()  # a link stays one
    try:
        text = place.read_bytes().decode() if place.is_file() else ""
        # dotenv's own pieces: a line within a quoted value of several lines is no setting
        pieces = list(parse_stream(io.StringIO(text, newline="")))
        lines = [piece.original.string for piece in pieces]
        end = "\r\n" if "\r\n" in text else "\n"
        for name, value in values.items():
            # dotenv takes the last
            last = max((i for i, piece in enumerate(pieces) if piece.key == name), default=None)
            if last is not None:
                lines[last] = _replaced(lines[last], name, value)
                continue
            if lines and not lines[-1].endswith(("\n", "\r")):
                lines[-1] += end
            lines.append(f"{name}={value}{end}")
        mode = place.stat().st_mode & 0o777 if place.is_file() else 0o600  # secrets may stand in it
        files.write_bytes(place, "".join(lines).encode(), mode)
    except (OSError, UnicodeDecodeError) as error:
        raise MachineError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or 'not UTF-8'}); call this from a folder where it can, "
            f"or set {_set(values)} yourself"
        ) from None


def _set(values: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def _replaced(line: str, name: str, value: str) -> str:
    """The line with another value in the same quotes; what stands before and behind it stays."""
    pattern = rf"(?s)(\s*(?:export\s+)?['\"]?{name}['\"]?[^\S\r\n]*)(=[^\S\r\n]*)?('[^']*'|\"[^\"]*\"|[^\s#]\S*|)(.*)"
    parts = re.fullmatch(pattern, line)
    assert parts is not None  # dotenv found the name in it
    before, sign, old, behind = parts.groups()
    quote = old[0] if old[:1] in ("'", '"') else ""
    behind = f" {behind}" if behind.startswith("#") else behind  # else it would be a part of the value
    return f"{before}{sign or '='}{quote}{value}{quote}{behind}"
