"""The same work on many pieces, in several processes. A killed process is noticed; datasets' own pool would wait for it."""

from __future__ import annotations

import collections
import ctypes
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from finetune.errors import MachineError

FEW_ROWS = 1000  # rows that one process finishes before others have started
AHEAD = (
    4  # pieces for each process that are given out, or done and not yet taken; after a signal they are still finished
)
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

Piece = TypeVar("Piece")
Made = TypeVar("Made")
_work: Callable[[Any], Any]  # of a child, which has it from the fork: sending a tokenizer takes a second


def results(work: Callable[[Piece], Made], pieces: Iterable[Piece], processes: int) -> Iterator[Made]:
    """What `work` makes of each piece, in their order whatever the number of processes, a few ahead of who takes them.

    Raises what `work` raises, and MachineError where a process was killed.
    """
    if processes == 1:
        yield from map(work, pieces)
        return
    fork = multiprocessing.get_context("fork")
    waiting, left = collections.deque[Future[Made]](), iter(pieces)
    try:
        with ProcessPoolExecutor(processes, fork, _begin, (work,)) as pool:
            try:
                while True:
                    for piece in itertools.islice(left, AHEAD * processes - len(waiting)):
                        waiting.append(pool.submit(_one, piece))
                    if not waiting:
                        break
                    yield waiting.popleft().result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise MachineError(
            f"DATASET_NUM_PROC={processes}: a process that tokenizes was killed, most often because memory ran out; use fewer of "
            "them, for example DATASET_NUM_PROC=1"
        ) from None


def _begin(work: Callable[[Any], Any]) -> None:
    """Runs first in each child. The parent handles ^C and ends children with SIGTERM. If the parent is killed, they end too."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _one(piece: Any) -> Any:
    return _work(piece)
