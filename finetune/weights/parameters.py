"""How many parameters a model has."""

from __future__ import annotations

import math
import re

from finetune.errors import MachineError, SettingsError
from finetune.sources.model import Source, weight_files
from finetune.weights import safetensors


def parameters(source: Source) -> int | None:
    """Parameters of a model, counted in its safetensors headers, else as a Hub name states them; None: unknown.

    source: its folder need not be there yet. Raises MachineError where one of its files is damaged or closed, HubError
    where the Hub's own hash says that too.
    """
    try:
        # and no others: consolidated.safetensors are the same weights once more
        names = [name for name in weight_files(source.folder) if name.endswith(".safetensors")]
    except SettingsError:
        names = []
    count = 0
    for name in names:
        try:
            header = safetensors.header(source.folder / name)
        except MachineError:
            source.check([name])
            raise
        count += sum(math.prod(tensor["shape"]) for tensor in header.values())
    local = source.commit is None and source.folder.is_dir()
    return count or (None if local else stated(source.name))


def stated(name: str) -> int | None:
    """Parameters as a name states them, such as 8B; None: it states none."""
    found = re.findall(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BbMm])(?![A-Za-z0-9])", name.rpartition("/")[2])
    if not found:
        return None
    number, unit = found[-1]
    return int(float(number) * (1e9 if unit in "Bb" else 1e6))
