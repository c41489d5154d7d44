"""Rows of the Hub that are read over the network, a few at a time: what they were made of is never on the disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from finetune.errors import HubError, Refusal
from finetune.settings import Settings
from finetune.sources.client import talk

if TYPE_CHECKING:
    from datasets import IterableDataset

BATCH = 1000  # rows that are Python objects at a time
Row = dict[str, Any]


class Stream:
    """A split at one commit. total: how many rows the Hub says that it has; None: it does not say."""

    def __init__(
        self, settings: Settings, commit: str, found: IterableDataset, total: int | None, wrong: Callable[[Exception], Refusal]
    ):  # fmt: skip
        """wrong: the refusal where `datasets` makes no rows of what the Hub gave."""
        self.commit, self.total = commit, total
        self.found, self.wrong, self.name = found, wrong, settings.dataset_name

    def rows(self, after: int, wanted: set[str]) -> Iterator[Row]:
        """The rows after so many; a column that is not wanted is None. Raises HubError or SettingsError where they do not come.

        Those before are read too, and left out. After a fault the stream begins again: one that broke off would seem to end.
        """
        names = self.found.column_names
        # others may be pictures, which would be decoded; without columns there are no rows
        used = (
            self.found.select_columns([name for name in names if name in wanted] or names[:1]) if names else self.found
        )
        number, rows = after, None

        def more() -> list[Row]:
            nonlocal rows
            going = rows if rows is not None else itertools.islice(iter(used), number, None)
            rows = None
            batch = [*itertools.islice(going, BATCH)]
            rows = going
            return batch

        while batch := talk("DATASET_NAME", self.name, more, self.commit, self.wrong):
            names = names or [*batch[0]]
            for row in batch:
                number += 1
                yield {**dict.fromkeys(names), **{name: value for name, value in row.items() if name in wanted}}
            self._told(number > (self.total or number), number)
        self._told(number < (self.total or 0), number)

    def _told(self, differs: bool, number: int) -> None:
        if differs:
            raise HubError(
                f"DATASET_NAME={self.name}: its card says {self.total} rows, and row {number} is "
                f"{'there' if number > (self.total or 0) else 'the last'}; with STREAMING=0 all of it is read and checked"
            )

    def count(self, most: int | None) -> int:
        """How many rows there are, or `most` if there are more. Where the Hub does not say, they are read."""
        if self.total is not None:
            return self.total if most is None else min(most, self.total)
        if most is None:
            print(
                f"data: the Hub does not say how many rows {self.name} has; reading them once to count them", flush=True
            )
        return sum(1 for _ in itertools.islice(self.rows(0, set()), most))
