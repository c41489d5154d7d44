"""base + adapter, block by block: each sum is made in float64 and rounded once to the tensor's own type.

So CPU and GPU, and any number of threads, give the same bytes.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from finetune.errors import MergeError
from finetune.weights.adapter import Adapter
from finetune.weights.shards import Base, Shard

WORKERS = min(4, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What the merged tensors are.

    changed: targets whose weights moved; rounded_away: targets whose change was too small for 16 bits. unreached: targets for
    which nothing was learned, such as layers without a gradient; unreached_first: one of them. kept: tensors without a
    target, equal to the base's bit for bit; rounded: to the base's, rounded to bfloat16.
    """

    changed: int
    rounded_away: int
    unreached: int
    unreached_first: str | None
    kept: int
    rounded: int


@dataclasses.dataclass(frozen=True)
class Block:
    """`BLOCK` weights of a tensor, in the base's shard and in the one that is made of it. row: the first."""

    shard: Shard
    made: Shard
    name: str
    row: int


class Sums:
    """base + adapter, block by block. device: where the sums are made."""

    def __init__(self, base: Base, adapter: Adapter, device: str):
        self.targets, self.scale, self.device = adapter.locate(base), adapter.scale, device
        self.dtypes, self.changed = _merged_dtypes(base), set[str]()
        self.kept = [name for name in base.shapes if name not in self.targets]
        self.rounded = [name for name in self.kept if self.dtypes[name] != base.dtypes[name]]
        # B begins with zeros, and keeps them where no gradient came
        pairs = ((name, target) for name, target in self.targets.items() if isinstance(target, tuple))
        self.unreached = {name for name, pair in pairs if not all(bool(factor.any()) for factor in pair)}
        # only of the tensors in work: for an 8B model the whole adapter in float64 takes 0.3 GB of the card at rank 16,
        # 5 GB at 256
        self.factors = functools.lru_cache(2 * WORKERS)(self._factors)

    def begin_thread(self) -> None:
        """For a thread that makes sums: its own stream. On the common one each would wait for what the model computes meanwhile."""
        if self.device == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())

    def _factors(self, name: str) -> list[Tensor]:
        moved = [factor.to(self.device) for factor in self.targets[name]]
        self._arrived()
        return moved

    def _arrived(self) -> None:
        """Wait until what this thread gave to the GPU is there. Only then may another thread use it, or its memory be used again."""
        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()

    def merged(self, block: Block) -> tuple[Tensor, Tensor]:
        """The block of the base in the type of the merge, and what it becomes: the sum, the trained bias, or itself."""
        weight, target = block.shard.read(block.name, block.row), self.targets.get(block.name)
        before = weight.to(self.dtypes[block.name])
        if not isinstance(target, tuple):
            return before, before if target is None else target.to(before.dtype)[None]
        left, right = self.factors(block.name)
        exact = weight.to(self.device).to(torch.float64, copy=True)
        exact.addmm_(left[block.row : block.row + len(weight)], right, alpha=self.scale)
        merged = exact.to(before.dtype)
        self._arrived()
        return before, merged

    def counts(self) -> Counts:
        """The counts of what was checked."""
        changed, unreached = len(self.changed), sorted(self.unreached - self.changed)
        return Counts(
            changed=changed,
            rounded_away=len(self.targets) - changed - len(unreached),
            unreached=len(unreached),
            unreached_first=unreached[0] if unreached else None,
            kept=len(self.kept) - len(self.rounded),
            rounded=len(self.rounded),
        )

    def write(self, block: Block) -> None:
        """Write the block to its place in a file that has its header."""
        content = memoryview(self.merged(block)[1].cpu().view(torch.uint8).numpy()).cast("B")
        with open(block.made.path, "r+b", buffering=0) as stream:
            stream.seek(block.made.offset(block.name, block.row))
            while content:
                content = content[stream.write(content) :]

    def check(self, block: Block) -> None:
        """Read the block back. Raises MergeError where it is not base + adapter, bit for bit, or not finite."""
        before, merged = self.merged(block)
        found, at = block.made.read(block.name, block.row), f"{block.made.path.name}: {block.name}"
        if not finite(found):
            raise MergeError(f"{at} holds values that are not finite")
        if not torch.equal(found.to(merged.device).view(torch.uint8), merged.view(torch.uint8)):
            wrong = "is not base + adapter" if block.name in self.targets else "has no adapter, but is not the base's"
            raise MergeError(f"{at} {wrong}")
        if block.name in self.targets and not torch.equal(found, before):
            self.changed.add(block.name)
        elif isinstance(target := self.targets.get(block.name), torch.Tensor):
            weight = block.shard.read(block.name, block.row)
            if torch.equal(target.to(torch.float64)[None], weight.to(torch.float64)):  # a bias as it was
                self.unreached.add(block.name)


def finite(tensor: Tensor) -> bool:
    """Whether all values are finite. One NaN makes the minimum and the maximum NaN."""
    return not tensor.is_floating_point() or all(map(math.isfinite, tensor.aminmax()))


def _merged_dtypes(base: Base) -> dict[str, torch.dtype]:
    """The type of each merged tensor: the base's own, but a base that is float32 or float64 as a whole becomes 16-bit.

    Its matrices then become bfloat16, which has their range. What has fewer dimensions stays (norms, biases, A_log):
    it is small, and the model may need its last bits.
    """
    wide = (torch.float32, torch.float64)
    if most(base, base.dtypes) not in wide:
        return dict(base.dtypes)
    narrowed = {name for name, dtype in base.dtypes.items() if dtype in wide and len(base.shapes[name]) > 1}
    return {name: torch.bfloat16 if name in narrowed else dtype for name, dtype in base.dtypes.items()}


def most(base: Base, dtypes: Mapping[str, torch.dtype]) -> torch.dtype | None:
    """The type that most of the base's weights have in `dtypes`; None: it has none."""
    counts: collections.Counter[torch.dtype] = collections.Counter()
    for name, dtype in dtypes.items():
        if dtype.is_floating_point:
            counts[dtype] += math.prod(base.shapes[name])
    return counts.most_common(1)[0][0] if counts else None


def blocks(shard: Shard, made: Shard) -> list[Block]:
    """All blocks of a shard, in the order of its tensors."""
    return [Block(shard, made, name, row) for name in shard.names for row in shard.starts(name)]
