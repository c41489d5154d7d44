"""`verify`: is OUTPUT_DIR what the run left there, and are its merged weights base + adapter? No GPU, no network.

Every file against its sha256 in run.json, then block by block, in little memory. Where the base is not on this machine, what
can be told without it is checked, and what cannot is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from finetune.errors import HubError, OutputError, Refusal, first_line, ours
from finetune.run import folder, inputs
from finetune.run.record import Record, same
from finetune.settings import Settings
from finetune.training import checkpoints
from finetune.weights import compare


def run(settings: Settings, environ: Mapping[str, str], _: str) -> None:
    for line in lines(settings):
        print(line, flush=True)


def lines(settings: Settings) -> Iterator[str]:
    """Lines that say what was found, as it is found. Raises OutputError that names each file or tensor that is wrong."""
    output = Path(settings.output_dir)
    record = folder.verify(output)
    yield f"{output}: all {len(record['files'])} files are as the run wrote them"
    if wrong := list(checkpoints.problems(output / "checkpoints")):
        raise OutputError(
            *wrong, f"{output / 'checkpoints'}: may be removed as a whole; the run is complete without it"
        )
    kept = {part for part in ("adapter", "merged") if (output / part).is_dir()}
    if not kept:
        return
    try:
        yield _weights(output, kept, record, settings)
    except (HubError, OSError):
        raise
    except Refusal as error:  # the base is the recorded one, so the fault is in the output
        raise OutputError(*error.problems) from None
    except Exception as error:  # of a library that was given an odd config.json
        if ours(error):
            raise
        raise OutputError(f"OUTPUT_DIR={output}: cannot be read as a model ({first_line(error)})") from None


def _weights(output: Path, kept: set[str], record: Record, settings: Settings) -> str:
    """What was found of the weights, with the base where it is at hand."""
    if kept == {"adapter", "merged"}:
        base, why_not = inputs.base(record, settings)
        if base is not None:
            found = compare.compare(base, output)
            targets = found.changed + found.rounded_away + found.unreached
            return (
                f"{output / 'merged'}: {targets} tensors are base + adapter, rounded once; the other "
                f"{same(found.kept, found.rounded)}; all are finite"
            )
        missing = f"that merged is base + adapter: {why_not}"
    else:
        missing = f"that merged is base + adapter: only {min(kept)} was kept"
    return f"{output}: {compare.structure(output)}. Not checked: {missing}"
