"""The same work on many rows, in several processes. A killed process is noticed; datasets' own pool would wait for it."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from finetune.data.reading import Row
from finetune.errors import MachineError

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Table

FEW_ROWS = 1000  # rows that one process finishes before others have started
CHUNK = 250  # rows given to a process at a time; after a signal it still finishes them
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

_work: Callable[[Row], Row]  # of a child, which has it from the fork: sending a tokenizer takes a second


def results(work: Callable[[Row], Row], rows: list[Row], processes: int) -> Dataset:
    """What `work` makes of each row, in the order of the rows whatever the number of processes.

    Raises what `work` raises, and MachineError where a process was killed.
    """
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable

    if processes == 1 or len(rows) <= FEW_ROWS:
        return Dataset(InMemoryTable(_table(work, rows)))
    fork = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(processes, fork, _begin, (work,)) as pool:
            chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
            tables = list(pool.map(_chunk, chunks))
    except BrokenProcessPool:
        raise MachineError(
            f"DATASET_NUM_PROC={processes}: a process that tokenizes was killed, most often because memory ran out; use fewer of "
            "them, for example DATASET_NUM_PROC=1"
        ) from None
    return Dataset(InMemoryTable(pyarrow.concat_tables(tables)))


def _begin(work: Callable[[Row], Row]) -> None:
    """Runs first in each child. The parent handles ^C and ends children with SIGTERM. If the parent is killed, they end too."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _chunk(rows: list[Row]) -> Table:
    return _table(_work, rows)


def _table(work: Callable[[Row], Row], rows: list[Row]) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist([work(row) for row in rows])
