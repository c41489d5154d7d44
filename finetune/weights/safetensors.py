"""The headers of safetensors files: which tensors, of which type and shape, and where their bytes are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import MachineError
from finetune.machine.permissions import denied


def header(file: Path, *, whole: bool = False) -> dict[str, dict[str, Any]]:
    """dtype, shape and data_offsets of each tensor in a safetensors file.

    whole: the tensors must be there too. Raises MachineError where the file is damaged or closed.
    """
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            if not 1 < length <= size:
                raise ValueError
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            counts, end = [math.prod(entry["shape"]) for entry in tensors.values()], 8 + length + data_bytes(tensors)
            if min(counts, default=0) < 0 or (whole and end != size):
                raise ValueError
            return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        problem = denied(file) or f"{file}: not a whole safetensors file; download or copy the model again"
        raise MachineError(problem) from None


def data_bytes(header: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes of the tensors in a safetensors file with this header; they fill it from offset 0 without holes."""
    return max((entry["data_offsets"][1] for entry in header.values()), default=0)
