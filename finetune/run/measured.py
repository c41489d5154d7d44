"""What the losses of held-out rows say: did training help? Means, intervals, and one sentence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
BLOCK = 2**22  # numbers drawn at a time
FEW = 8  # rows of which a bootstrap says little
INSIDE = (2.5, 97.5)  # percentiles: 95 % lie between

Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class Loss:
    """The mean loss of a label; low, high: its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.mean, 700))

    def record(self) -> dict[str, float]:
        """What run.json says of it."""
        return dict(loss=self.mean, low=self.low, high=self.high, perplexity=self.perplexity)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two measurements of the same rows. change: of the loss, from the first to the second; below 0 it fell."""

    rows: int
    before: Loss
    after: Loss
    change: Loss

    @property
    def told(self) -> bool:
        """Whether the interval of the change leaves out 0, of enough rows."""
        return self.rows >= FEW and not self.change.low <= 0 <= self.change.high

    def sentence(self, name: str = "the loss") -> str:
        """Whether it helped, in one sentence."""
        a, b, low, high = self.before, self.after, self.change.low, self.change.high
        both = f"On {self.rows} held-out row{'s' * (self.rows != 1)} {name}"
        perplexity = f"perplexity {_short(a.perplexity)} to {_short(b.perplexity)}"
        least, most = sorted((abs(low), abs(high)))
        digits = 2 if most >= 0.02 else 4
        means = f"from {a.mean:.{digits}f} to {b.mean:.{digits}f}"
        if self.told:
            way = "fell" if high < 0 else "rose"
            return f"{both} {way} {means} ({perplexity}; 95 %: by {least:.{digits}f} to {most:.{digits}f})"
        why = f"fewer than {FEW} rows are too few to tell" if self.rows < FEW else "too few updates or rows to tell"
        return f"{both} went {means} ({perplexity}; 95 %: a change of {low:+.{digits}f} to {high:+.{digits}f}): {why}"

    def record(self) -> dict[str, Any]:
        """What run.json says of it."""
        change = dict(loss=self.change.mean, low=self.change.low, high=self.change.high)
        return dict(before=self.before.record(), after=self.after.record(), change=change)


def compare(before: Sequence[float], after: Sequence[float], labels: Sequence[int]) -> Comparison:
    """Two measurements of the same rows, in pairs. before, after: summed loss of each row; labels: how many tokens each sum is of.

    The intervals are those of a bootstrap over rows: rows are drawn again, with their labels, and the mean of a label is taken anew.
    Two calls give the same numbers.
    """
    first, second, weights = (np.array(values, np.float64) for values in (before, after, labels))
    sums = np.stack([first, second, second - first, weights])
    drawn = _resampled(sums)
    means = drawn[:3] / np.maximum(drawn[3], 1)
    lows, highs = np.percentile(means, INSIDE, axis=1)
    whole = sums[:3].sum(1) / sums[3].sum()
    losses = [Loss(float(mean), float(low), float(high)) for mean, low, high in zip(whole, lows, highs, strict=True)]
    return Comparison(len(first), *losses)


def _resampled(sums: Numbers) -> Numbers:
    """The sums (4, rows) of RESAMPLES draws of as many rows: (4, RESAMPLES)."""
    rows, generator = sums.shape[1], np.random.default_rng(0)
    size = max(1, BLOCK // rows)
    parts = []
    for start in range(0, RESAMPLES, size):
        index = generator.integers(0, rows, (min(size, RESAMPLES - start), rows))
        parts.append(np.stack([values[index].sum(1) for values in sums]))
    return np.concatenate(parts, axis=1)


def _short(perplexity: float) -> str:
    return (
        f"{perplexity:.1f}" if perplexity < 100 else f"{perplexity:,.0f}" if perplexity < 1e6 else f"{perplexity:.2g}"
    )
