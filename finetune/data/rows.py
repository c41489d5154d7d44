"""The rows that are trained, and those that are held out. They stay on disk: nothing here grows with their number."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from finetune.data import formats, held_rows, origin, store
from finetune.data.checked import Checked
from finetune.data.formats import FORMATS
from finetune.data.held_rows import Held
from finetune.data.reading import Row
from finetune.settings import Settings

# settings that decide what is made of the rows of a source; tests/unit/test_store.py compares them with those that this package reads
READING = (
    "dataset_config", "dataset_split", "dataset_format", "prompt_columns", "completion_columns", "drop_bad_rows", "eval_rows",
    "eval_split", "eval_dataset_name",
)  # fmt: skip
TOKENIZING = ("max_seq_length", "train_on", "keep_reasoning", "prompt_template", "prompt_columns", "completion_columns")
T = TypeVar("T")


class Each(Sequence[T]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, size: int, get: Callable[[int], T], every: Callable[[], Iterator[T]] | None = None):
        """every: all of them one after the other, where that is faster."""
        self.size, self.get = size, get
        self.every = every or (lambda: map(get, range(size)))

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[T]:
        return self.every()

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self.get(index) for index in range(*key.indices(self.size))]
        if not -self.size <= key < self.size:
            raise IndexError(key)
        return self.get(int(key) % self.size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that passed the checks. format: their form's name. seen, dropped: rows read, and left out. held: rows that are held out.

    sha256: of their texts in order, so that equal data is known as equal. files: their names, for places.
    """

    name: str
    commit: str | None
    format: str
    seen: int
    dropped: int
    sha256: str
    files: list[str]
    stored: store.Stored
    held: Held | None = None

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def rows(self) -> Each[Row]:
        """The rows, each read when it is asked for."""
        return Each(len(self), lambda index: self.some([index])[0], self._every)

    @property
    def places(self) -> Each[str]:
        """Of each row: its file, number and line, such as "rows.jsonl row 3 (line 4)"."""
        return Each(len(self), self._place)

    def some(self, numbers: Sequence[int]) -> list[Row]:
        """Rows by their numbers; fastest where they ascend."""
        found: list[Row] = []
        texts: Any
        last, texts = -1, []
        for number in numbers:
            batch, at = self.stored.at(number)
            if batch != last:
                last, texts = batch, self.stored.batch(batch).column("json")
            found.append(json.loads(texts[at].as_py()))
        return found

    def record(self) -> dict[str, Any]:
        """What run.json says of the data."""
        return dict(
            name=self.name,
            commit=self.commit,
            format=self.format,
            seen=self.seen,
            dropped=self.dropped,
            sha256=self.sha256,
        )

    def _every(self) -> Iterator[Row]:
        return (json.loads(text) for batch in self.stored for text in batch.column("json").to_pylist())

    def _place(self, index: int) -> str:
        batch, at = self.stored.at(index)
        row = self.stored.batch(batch).slice(at, 1).to_pylist()[0]
        return origin.told(self.files, row["file"], row["number"], row["line"])


def load(settings: Settings) -> Rows:
    """Read and check the rows that DATASET_NAME and DATASET_SPLIT name, into a store; where that has them, nothing is read.

    Raises SettingsError that names file and row of the bad ones; with DROP_BAD_ROWS they are left out and counted.
    """
    source = origin.of(settings)
    key = dict(
        version=store.version(),
        source=source.content,
        settings={name: getattr(settings, name) for name in READING},
    )
    with store.opened("rows", key) as opened:
        if opened.done is None:
            store.room(2 * source.size, "rows and tokens")
            where = held_rows.places(settings, source)
            written, said = Checked(settings, source, opened, where.trained).stored()
            opened = written.finish({**said, "held": held_rows.of_split(settings, source, where)})
        assert opened.done is not None
        said = opened.done
        form = FORMATS[said["format"]]
        form.check(settings)  # refused now, and not after a model was downloaded
        print(formats.told(dict.fromkeys(said["columns"]), form, settings), flush=True)
        return Rows(
            name=settings.dataset_name,
            commit=source.commit,
            format=form.NAME,
            seen=said["seen"],
            dropped=said["bad"],
            sha256=said["sha256"],
            files=source.names,
            stored=opened.rows(),
            held=held_rows.again(settings, source, said["held"]),
        )
