"""Weights on disk, shard by shard and block by block: what is read, and what is written."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import MergeError, SettingsError
from finetune.sources.model import Source, weight_files
from finetune.sources.quantised import quantised
from finetune.weights import safetensors

# Weights that are added at once, the same on every device: BLAS may add in another order where a matrix has another
# shape. Another order changes the last bit of most float64 sums, and 3e-14 of them then round to another bfloat16.
# Malloc keeps the 8 MB of float64 for the next block. It would take 32 MB from the system each time, and a sum would
# take 5 times as long.
BLOCK = 2**20
CODES = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class Shard:
    """One file of weights, read block by block. It is read, not mapped, so that one block at a time is in memory."""

    def __init__(self, path: Path, *, whole: bool = True):
        """whole: the data must be there too; a file that is being written has only its header."""
        self.path = path
        if path.suffix == ".safetensors":
            self.header = safetensors.header(path, whole=whole)
            with open(path, "rb") as stream:
                self.data = 8 + int.from_bytes(stream.read(8), "little")
            self.names = sorted(self.header, key=lambda name: self.header[name]["data_offsets"][0])
            self.shapes = {name: tuple(self.header[name]["shape"]) for name in self.names}
            if unknown := {entry["dtype"] for entry in self.header.values()} - set(CODES):
                raise SettingsError(
                    f"{path}: holds {', '.join(sorted(unknown))}, and the merge needs a 16-bit base; name the 16-bit "
                    "original in MODEL_NAME, or set SAVE_MERGED=0"
                )
            self.dtypes = {name: getattr(torch, CODES[self.header[name]["dtype"]]) for name in self.names}
        else:
            # torch.save before 1.6 wrote no zip archive, and only a zip archive can be mapped
            mapped = zipfile.is_zipfile(path)
            self.loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
            self.names = sorted(name for name, value in self.loaded.items() if isinstance(value, torch.Tensor))
            self.shapes = {name: tuple(self.loaded[name].shape) for name in self.names}
            self.dtypes = {name: self.loaded[name].dtype for name in self.names}

    def starts(self, name: str) -> range:
        """The rows at which the tensor's blocks begin. A row is all of the last dimension."""
        *above, width = self.shapes[name] or (1,)
        return range(0, math.prod(above) if width else 0, max(1, BLOCK // max(1, width)))

    def read(self, name: str, row: int) -> Tensor:
        """The block that begins at that row, as a matrix (rows, width).

        Raises SettingsError where the file ends within it.
        """
        starts, width = self.starts(name), (self.shapes[name] or (1,))[-1]
        count = min(starts.step, starts.stop - row)
        if self.path.suffix != ".safetensors":
            return torch.atleast_2d(self.loaded[name]).flatten(0, -2)[row : row + count].contiguous()
        block = torch.empty(count, width, dtype=self.dtypes[name])
        with open(self.path, "rb") as stream:  # buffered: a read that comes in parts, as over a network, is made whole
            stream.seek(self.offset(name, row))
            if stream.readinto(block.view(torch.uint8).numpy()) != block.nbytes:
                raise SettingsError(f"{self.path}: ends within {name}; download or copy the model again")
        return block

    def offset(self, name: str, row: int) -> int:
        """Where in the safetensors file the row's bytes begin."""
        start, end = self.header[name]["data_offsets"]
        return self.data + start + row * (end - start) // self.starts(name).stop


class Base:
    """The 16-bit base on disk. Raises SettingsError where it is quantised, or has no weights that can be read."""

    def __init__(self, folder: Path):
        if problem := quantised(Source(str(folder), None, folder)):
            raise SettingsError(problem)
        self.shards = [Shard(folder / name) for name in weight_files(folder)]
        self.folder = folder
        self.shapes = {name: shape for shard in self.shards for name, shape in shard.shapes.items()}
        self.dtypes = {name: dtype for shard in self.shards for name, dtype in shard.dtypes.items()}
        self.size = sum(shard.path.stat().st_size for shard in self.shards)


def begin(shard: Shard, path: Path, dtypes: Mapping[str, torch.dtype]) -> Shard:
    """The file for what is made of the shard: length of the header (8 bytes), header in JSON, and as yet no data."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **header_of(shard, dtypes)}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return Shard(path, whole=False)


def made_of(shard: Shard, path: Path, dtypes: Mapping[str, torch.dtype], *, whole: bool = True) -> Shard:
    """The file at `path`. whole: it is complete.

    Raises MergeError where it does not hold the base's tensors in their order and the merge's types.
    """
    made, wanted = Shard(path, whole=whole), header_of(shard, dtypes)
    if wrong := sorted(name for name in {*made.header, *wanted} if made.header.get(name) != wanted.get(name)):
        raise MergeError(f"{path.name}: holds other tensors than the base's {shard.path.name}: {', '.join(wrong)}")
    return made


def header_of(shard: Shard, dtypes: Mapping[str, torch.dtype]) -> dict[str, dict[str, Any]]:
    """The safetensors header of what is made of the shard: its tensors, in its order, one after the other."""
    codes = {f"torch.{name}": code for code, name in CODES.items()}
    header, offset = {}, 0
    for name in shard.names:
        dtype, shape = dtypes[name], shard.shapes[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = dict(dtype=codes[str(dtype)], shape=list(shape), data_offsets=[offset, end])
        offset = end
    return header


def shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def index(paths: list[Path]) -> dict[str, Any]:
    """The content of the index over these safetensors files."""
    headers = {path.name: safetensors.header(path) for path in paths}
    weights = {name: file for file, header in headers.items() for name in header}
    total = sum(safetensors.data_bytes(header) for header in headers.values())
    return dict(metadata=dict(total_size=total), weight_map=dict(sorted(weights.items())))
