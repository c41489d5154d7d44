"""Signals that end a run: told at once, by a thread. Python's handlers wait until a long call into C has returned."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_said = threading.Event()
_words: Callable[[], str] | None = None  # what the next signal brings, where it is not the end at once


def listen() -> None:
    """From now on each signal that ends the run is told, and SIGTERM and SIGHUP end it with an exit code of their own."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # what ends a child is not told twice
    threading.Thread(target=_tell, args=(read,), daemon=True).start()
    for number in heeded():
        if number != signal.SIGINT:  # KeyboardInterrupt does
            signal.signal(number, end)


def heeded() -> list[signal.Signals]:
    """The signals that end this run: not those that whoever started it has it ignore (nohup, a job in the background)."""
    return [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def told(words: Callable[[], str]) -> Iterator[None]:
    """For a while, `words` says what the first signal brings. The second one is the end at once."""
    global _words
    _words = words
    try:
        yield
    finally:
        _words = None


def end(number: int, frame: Any) -> None:
    """End the run, as a handler of signals; after the line that says so."""
    _said.wait(1)
    sys.exit(128 + number)


def _tell(read: int) -> None:
    global _words
    while numbers := os.read(read, 1):
        if numbers[0] not in ENDING:
            continue
        words, _words = _words, None
        line = f"{signal.Signals(numbers[0]).name}: {words() if words else 'ending now'}\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())  # not print: the signal may have come in the middle of one
        if not words:
            _said.set()
