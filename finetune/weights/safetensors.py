"""The headers of safetensors files: which tensors, of which type and shape, and where their bytes are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import MachineError
from finetune.machine.permissions import denied

# bits of a value; of another type the size is not checked
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16} | {
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
LONGEST = 100_000_000  # bytes of a header; the safetensors library reads no longer one


def header(file: Path, *, whole: bool = True) -> dict[str, dict[str, Any]]:
    """dtype, shape and data_offsets of each tensor in a safetensors file: what the library would read, in the order of the file.

    whole: the tensors must be there too, and nothing behind them. Raises MachineError where the file is damaged or closed.
    """
    try:
        with open(file, "rb") as stream:
            length, size = int.from_bytes(stream.read(8), "little"), file.stat().st_size
            if not 1 < length <= min(size, LONGEST):
                raise ValueError
            found = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in found.items() if name != "__metadata__"}
            end = 0
            for entry in sorted(tensors.values(), key=lambda entry: tuple(entry["data_offsets"])):
                end = _end(entry, end)
            if whole and 8 + length + end != size:
                raise ValueError
            return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        problem = denied(file) or f"{file}: not a whole safetensors file; download or copy the model again"
        raise MachineError(problem) from None


def _end(entry: Mapping[str, Any], begin: int) -> int:
    """Where a tensor's bytes end that begin at `begin`. Raises ValueError where its entry says something that cannot be."""
    (first, last), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    whole = all(type(number) is int and number >= 0 for number in (first, last, *shape))
    bits = BITS.get(dtype)
    if not (whole and isinstance(dtype, str) and first == begin <= last) or not isinstance(shape, list):
        raise ValueError
    if bits is not None and (last - first) * 8 != math.prod(shape) * bits:
        raise ValueError
    return int(last)


def data_bytes(header: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes of the tensors in a safetensors file with this header; they fill it from offset 0 without holes."""
    return max((entry["data_offsets"][1] for entry in header.values()), default=0)
