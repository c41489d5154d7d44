"""What a run says: one line for each phase, progress while it trains, and a heartbeat that a health check can read."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import without_password

SILENCE, SILENCE_LATER, PATIENT = 5, 30, 60  # seconds between two lines, later on, and when that begins

_state: Path | None = None
_timeout = 0.0
_note: Path | None = None


def beat_in(folder: Path, timeout: float) -> None:
    """Keep the heartbeat in `folder`/heartbeat.json from now on. timeout: seconds after which a health check may call it old."""
    global _state, _timeout
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _state, _timeout = folder, timeout
    except OSError:
        _state = None  # a health check then finds none, and training goes on


def note_in(path: Path | None) -> None:
    """Keep the name of the phase in the file `path` from now on, or no longer. It outlives a process that is killed."""
    global _note
    _note = path
    _write_note("starting")


def _write_note(phase: str) -> None:
    if _note is not None:
        with contextlib.suppress(OSError):
            _note.write_text(json.dumps(dict(phase=phase, time=time.time())), encoding="utf-8")


def phase(name: str, line: str) -> None:
    """Announce what begins now."""
    print(line, flush=True)
    beat(name)
    _write_note(name)


@contextlib.contextmanager
def stage(name: str, what: str) -> Iterator[None]:
    """Say what is done now, again from time to time while it lasts, and at its end how long it took. name: of the phase."""
    began, ended = time.monotonic(), threading.Event()

    def say(end: str) -> None:
        # in one piece: another thread may print too
        sys.stdout.write(f"{what}: {time.monotonic() - began:.0f} s{end}\n")
        sys.stdout.flush()

    def tick() -> None:
        while not ended.wait(SILENCE if time.monotonic() - began < PATIENT else SILENCE_LATER):
            say(" so far")

    phase(name, what)
    threading.Thread(target=tick, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
    if time.monotonic() - began >= 1:
        say("")


def beat(phase: str) -> None:
    """Note that the run lives, and in which phase. `time` is in seconds since 1970."""
    if _state is None:
        return
    partial = _state / "heartbeat.json.partial"
    try:
        now = dict(phase=phase, pid=os.getpid(), time=time.time(), timeout=_timeout)
        partial.write_text(json.dumps(now), encoding="utf-8")
        os.replace(partial, _state / "heartbeat.json")
    except OSError:
        pass  # as above


def hush() -> None:
    """Silence the libraries' notes, also while they are imported. What matters is said here, once; errors still raise."""
    warnings.filterwarnings("ignore")
    logging.captureWarnings(True)
    for name in ("py.warnings", "bitsandbytes", "peft", "trl", "accelerate", "torch", "huggingface_hub", "unsloth"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet() -> None:
    """`hush` again after the imports, which may set levels of their own; and no progress bars while a model loads."""
    import datasets
    import transformers

    hush()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()


# of a terminal: all that moves, colours or hides text, except tab and line feed; and letters that turn the direction of others
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def _written(found: re.Match[str]) -> str:
    """A control character as it is written in Python."""
    return ascii(found[0])[1:-1]


class Plain:
    """A stream on which no value can do anything to the terminal: an answer, a row, a name. Control characters are written out."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        return int(self._stream.write(CONTROL.sub(_written, text)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard() -> None:
    """From now on nothing that is printed can upset the terminal, whatever letters it knows, or end the run where there is none."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if (
            getattr(sys, name) is None
        ):  # closed (>&-): the next file that is opened would get its number, and what libraries print
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no such letters is no reason to stop
    if not isinstance(sys.stdout, Plain):
        sys.stdout = Plain(sys.stdout)  # tqdm's bars, on stderr, do move the cursor


def bug(error: BaseException, secrets: Sequence[str]) -> list[str]:
    """What to say of an error that nobody expected, after its traceback, in which no secret is left."""
    text = without_password("".join(traceback.format_exception(error)))
    for secret in secrets:
        text = text.replace(secret, "<SECRET>")
    print(text, file=sys.stderr)
    return [
        f"this is a bug of this program ({type(error).__name__}). What has its final name in OUTPUT_DIR is whole, checkpoints too: "
        "the same command goes on from there. Please report it with the lines above, the command and its settings"
    ]


def leave(problems: Sequence[str], lost: bool) -> None:
    """Say why the program ends. lost: perhaps nothing can be written any more, and Python must not find that out once more."""
    with contextlib.suppress(OSError):
        print(
            *(CONTROL.sub(_written, f"error: {problem}") for problem in problems), sep="\n", file=sys.stderr, flush=True
        )
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        lost = True
    if lost:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Progress:
    """A bar on a terminal, else one plain line each `every` updates."""

    def __init__(self, total: int, every: int, done: int = 0):
        self.total, self.every, self.began, self.first = total, every, time.monotonic(), done
        self.window: list[dict[str, float]] = []
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def show(self, row: dict[str, float]) -> None:
        """Take one update's metrics."""
        step = int(row["step"])
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['tokens_per_s']:,.0f} tokens/s")
            self.bar.update(step - self.bar.n)
            return
        self.window.append(row)
        if step % self.every and step != self.total:
            return
        loss = sum(r["loss"] for r in self.window) / len(self.window)
        speed = sum(r["tokens"] for r in self.window) / sum(r["step_s"] for r in self.window)
        left = (time.monotonic() - self.began) / (step - self.first) * (self.total - step)
        print(
            f"step {step}/{self.total}  loss {loss:.4f}  learning rate {row['learning_rate']:.2e}  gradient norm "
            f"{row['grad_norm']:.3f}  epoch {row['epoch']:.2f}  {speed:,.0f} tokens/s  {row['memory_gib']:.1f} GiB  "
            f"{_clock(left)} left",
            flush=True,
        )
        self.window = []

    def close(self) -> None:
        """End the bar's line."""
        if self.bar is not None:
            self.bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Counted:
    """Progress of work on rows: a bar on a terminal, else a line every EVERY_S seconds, with rows/s and the time left."""

    EVERY_S = 10.0

    def __init__(self, what: str, total: int, done: int = 0):
        """what: has happened to the rows. done: rows of an earlier start."""
        self.what, self.total, self.done, self.first = what, total, done, done
        self.began = self.told = self.beaten = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        now = time.monotonic()
        if now - self.beaten > 1:
            self.beaten = now
            beat("loading")
            if sys.stderr.isatty():
                self._draw()
            elif now - self.told > self.EVERY_S:
                self.told = now
                print(self._line(now), flush=True)

    def _draw(self) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(
                total=self.total, initial=self.first, unit="row", desc=f"data: {self.what}", dynamic_ncols=True
            )
        self.bar.update(self.done - self.bar.n)

    def _line(self, now: float) -> str:
        speed = (self.done - self.first) / (now - self.began)
        return f"data: {self.done:,} of {self.total:,} {self.what}, {speed:,.0f} rows/s, {_clock((self.total - self.done) / speed)} left"
