"""Which rows make which update. The order is that of transformers' trainer, and is known before there is a trainer."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Order:
    """The updates of a run. lengths: tokens of each row of the data set. rows: of an update; updates: of the whole run."""

    lengths: Sequence[int] | NDArray[Any]
    rows: int
    updates: int
    seed: int

    @classmethod
    def of(cls, lengths: Sequence[int] | NDArray[Any], rows: int, max_steps: int, epochs: float, seed: int) -> Order:
        """The order of a run with MAX_STEPS updates; if that is -1, of a run with so many epochs."""
        updates = max_steps if max_steps > 0 else math.ceil(epochs * math.ceil(len(lengths) / rows))
        return cls(lengths, rows, updates, seed)

    def sampler(self) -> Any:
        """The data set's indices in the order of the first epoch, of the second in the next iteration, and so on."""
        return SeedableRandomSampler(range(len(self.lengths)), data_seed=self.seed)

    def indices(self) -> Iterator[list[int]]:
        """The rows of each update, endlessly."""
        batches = BatchSampler(self.sampler(), self.rows, drop_last=False)
        return itertools.chain.from_iterable(iter(lambda: list(batches), None))

    def tokens(self, most: int) -> list[list[int]]:
        """Tokens of the rows of each update, of `most` updates at the most."""
        seen = itertools.islice(self.indices(), min(most, self.updates))
        return [[int(self.lengths[index]) for index in update] for update in seen]
