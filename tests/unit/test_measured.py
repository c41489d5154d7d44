"""What losses of held-out rows say: the interval is that of a plain bootstrap, and the sentence says no more than it tells."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from finetune.run import measured


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    draw = random.Random(0)
    labels = [draw.randrange(20, 400) for _ in range(40)]
    before = [count * draw.gauss(2.0, 0.3) for count in labels]
    after = [loss - count * draw.gauss(0.1, 0.2) for loss, count in zip(before, labels, strict=True)]
    found = measured.compare(before, after, labels)
    assert found.before.mean == pytest.approx(sum(before) / sum(labels))
    assert found.change.mean == pytest.approx(found.after.mean - found.before.mean)
    changes = []
    for _ in range(10_000):
        rows = [draw.randrange(40) for _ in range(40)]
        changes.append(sum(after[row] - before[row] for row in rows) / sum(labels[row] for row in rows))
    cuts = statistics.quantiles(changes, n=40)  # the first and the last cut off 2.5 % each
    width = cuts[-1] - cuts[0]
    assert found.change.low == pytest.approx(cuts[0], abs=0.03 * width)
    assert found.change.high == pytest.approx(cuts[-1], abs=0.03 * width)
    assert measured.compare(before, after, labels) == found
    # in pairs: rows differ more from each other than each from itself
    assert found.change.high - found.change.low < (found.after.high - found.after.low)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    draw, held = random.Random(1), 0
    for _ in range(100):
        changes = [draw.gauss(-0.1, 0.5) for _ in range(64)]
        found = measured.compare([100 * 2.0] * 64, [100 * (2.0 + change) for change in changes], [100] * 64)
        held += found.change.low <= -0.1 <= found.change.high
    assert 88 <= held <= 99


def test_the_sentence() -> None:
    labels = [100] * 64
    before = [100 * (1.92 + (row % 8 - 3.5) / 50) for row in range(64)]

    def told(shift: float, spread: float = 0.1, rows: int = 64) -> str:
        after = [loss + 100 * (shift + spread * (row % 7 - 3)) for row, loss in enumerate(before)]
        return measured.compare(before[:rows], after[:rows], labels[:rows]).sentence()

    assert told(-0.51).startswith(
        "On 64 held-out rows the loss fell from 1.92 to 1.41 (perplexity 6.8 to 4.1; 95 %: by 0.4"
    )
    assert told(0.5).startswith("On 64 held-out rows the loss rose from 1.92 to 2.42 (perplexity 6.8 to 11.")
    assert told(0.001).endswith("): too few updates or rows to tell") and " fell" not in told(0.001)
    assert told(-0.5, rows=1).startswith("On 1 held-out row the loss went from")
    assert told(-0.5, rows=7).endswith("fewer than 8 rows are too few to tell")
    assert "fell from 1.92" in told(-0.5, rows=8)
    assert "95 %: by 0.0010 to 0.0010" in told(-0.001, 0)  # and not by 0.00


def test_a_loss_beyond_all_measure_is_still_a_number() -> None:
    found = measured.compare([1e9] * 8, [1e9] * 8, [1] * 8)
    assert math.isfinite(found.before.perplexity) and found.sentence()
