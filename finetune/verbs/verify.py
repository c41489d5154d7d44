"""`verify`: is OUTPUT_DIR what the run left there, and are its merged weights base + adapter? No GPU, no network.

Every file against its sha256 in run.json, then block by block, in little memory. Where the base is not on this machine, what
can be told without it is checked, and what cannot is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from finetune.run import folder, inputs
from finetune.run.record import same
from finetune.settings import Settings
from finetune.weights import merge as export


def run(settings: Settings, environ: Mapping[str, str], _: str) -> None:
    for line in lines(settings):
        print(line, flush=True)


def lines(settings: Settings) -> Iterator[str]:
    """Lines that say what was found, as it is found. Raises OutputError that names each file or tensor that is wrong."""
    output = Path(settings.output_dir)
    record = folder.verify(output)
    yield f"{output}: all {len(record['files'])} files are as the run wrote them"
    kept = {part for part in ("adapter", "merged") if (output / part).is_dir()}
    if not kept:
        return
    if kept == {"adapter", "merged"}:
        base, why_not = inputs.base(record, settings)
        if base is not None:
            found = export.compare(base, output)
            targets = found.changed + found.rounded_away + found.unreached
            yield (
                f"{output / 'merged'}: {targets} tensors are base + adapter, rounded once; the other "
                f"{same(found.kept, found.rounded)}; all are finite"
            )
            return
        missing = f"that merged is base + adapter: {why_not}"
    else:
        missing = f"that merged is base + adapter: only {kept.pop()} was kept"
    yield f"{output}: {export.structure(output)}. Not checked: {missing}"
