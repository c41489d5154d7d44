"""Where the rows come from, which of them are taken, and which are refused. They stay on disk: nothing here grows with their number."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from finetune.data import formats, locate, origin, store
from finetune.data.checked import Checked, told
from finetune.data.formats import FORMATS
from finetune.data.reading import Row
from finetune.errors import SettingsError
from finetune.settings import Settings
from finetune.sources import local

if TYPE_CHECKING:
    from numpy.typing import NDArray

# settings that decide which rows there are and what is made of them; tests/unit/test_store.py compares them with what this package reads
DECIDING = (
    "dataset_name", "dataset_config", "dataset_split", "dataset_revision", "prompt_columns", "completion_columns", "train_on",
    "drop_bad_rows", "max_seq_length", "dataset_format", "keep_reasoning", "prompt_template",
)  # fmt: skip
LATER = (
    "dataset_name",
    "dataset_revision",
    "max_seq_length",
    "train_on",
)  # the content says the first two; the others are for tokens
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
    """Rows that passed the checks. format: their form's name. seen, dropped: rows read, and left out.

    sha256: of their texts in order, so that equal data is known as equal. chosen: numbers of the rows that are taken; None: all.
    key: stands for the rows and all settings that made them.
    """

    name: str
    commit: str | None
    format: str
    seen: int
    dropped: int
    sha256: str
    files: list[str]
    stored: store.Stored
    key: dict[str, Any]
    chosen: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.stored) if self.chosen is None else len(self.chosen)

    @property
    def rows(self) -> Each[Row]:
        """The rows, each read when it is asked for."""
        every = self._every if self.chosen is None else None
        return Each(len(self), lambda index: json.loads(self._at(index)["json"]), every)

    @property
    def places(self) -> Each[str]:
        """Of each row: its file, number and line, such as "rows.jsonl row 3 (line 4)"."""
        return Each(len(self), lambda index: self._place(self._at(index)))

    def number(self, index: int) -> int:
        """Of the index-th row, among all that passed the checks."""
        return index if self.chosen is None else int(self.chosen[index])

    def place(self, number: int) -> str:
        """Where a row is, by its number among all that passed the checks."""
        return self._place(self._row(number))

    def some(self, numbers: Sequence[int]) -> list[Row]:
        """Rows by their numbers among all that passed the checks; fastest where they ascend."""
        found: list[Row] = []
        texts: Any
        last, texts = -1, []
        for number in numbers:
            batch, at = self.stored.at(number)
            if batch != last:
                last, texts = batch, self.stored.batch(batch).column("json")
            found.append(json.loads(texts[at].as_py()))
        return found

    def taken(self, chosen: NDArray[Any]) -> Rows:
        """The rows with these numbers alone, for example all but those that are held out."""
        return dataclasses.replace(self, chosen=chosen)

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

    def _at(self, index: int) -> Row:
        return self._row(self.number(index))

    def _row(self, number: int) -> Row:
        batch, at = self.stored.at(number)
        row: Row = self.stored.batch(batch).slice(at, 1).to_pylist()[0]
        return row

    def _place(self, row: Row) -> str:
        return told(self.files, row["file"], row["number"], row["line"])


def load(settings: Settings) -> Rows:
    """Read and check the rows that DATASET_NAME and DATASET_SPLIT name, into a store; where that has them, nothing is read.

    Raises SettingsError that names file and row of the bad ones; with DROP_BAD_ROWS they are left out and counted.
    """
    name = settings.dataset_name
    if problem := local.url("DATASET_NAME", name):
        raise SettingsError(problem)
    source = origin.of_hub(settings) if locate.on_hub(name) else origin.of_files(settings)
    key = dict(
        version=store.version(),
        source=source.content,
        columns=sorted(formats.wanted(settings)),
        settings={name: getattr(settings, name) for name in DECIDING if name not in LATER},
    )
    with store.opened("rows", key) as opened:
        if opened.done is None:
            store.room(2 * source.size, "rows and tokens")
            opened = Checked(settings, source, opened).stored()
        assert opened.done is not None
        said = opened.done
        form = FORMATS[said["format"]]
        form.check(settings)  # refused now, and not after a model was downloaded
        print(formats.told(dict.fromkeys(said["columns"]), form, settings), flush=True)
        return Rows(
            name,
            source.commit,
            said["format"],
            said["seen"],
            said["bad"],
            said["sha256"],
            source.names,
            opened.rows(),
            key,
        )
