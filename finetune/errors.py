"""The refusals a user can meet. Each carries the exit code of the process and every problem found, at once."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
from collections.abc import Iterator, Sequence

FULL = "make room, and the same command goes on from the last checkpoint"
CLOSED = "it belongs to somebody else, or is mounted read-only; run as its owner, or open it (chmod -R a+rwX)"
FILES = "raise the limit, for example ulimit -n 4096"
LONG = "names have at most 255 bytes, paths 4095; give a shorter one"
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "raise the limit (ulimit -f), or use a disk that takes larger files",
    errno.EACCES: CLOSED,
    errno.EPERM: CLOSED,
    errno.EROFS: CLOSED,
    errno.EMFILE: FILES,
    errno.ENFILE: FILES,
    errno.ENAMETOOLONG: LONG,
    errno.ENOMEM: "end other programs, or raise the limit (ulimit -v, docker run --memory)",
    errno.EAGAIN: "end other programs, or raise the limit (ulimit -u, docker run --pids-limit)",
    errno.EIO: "the disk may be failing; look at the system's log (dmesg), and use another one",
    errno.ESTALE: "the network disk was mounted anew; start again",
}
# what a program gets wrong by itself: a file that is not there, or is another thing than it thought
MISTAKES = (errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EBADF, errno.EINVAL, errno.ECHILD)


def of_machine(error: BaseException) -> str | None:
    """The sentence for what the machine refused; None: another error, which is a bug.

    Whatever the system refuses is the machine's, but for the mistakes that a program makes by itself. Libraries also raise
    OSError with a text of their own and no number; they say nothing of the machine. Those written in Rust (safetensors,
    tokenizers) raise errors of their own, with the system's number in the text.
    """
    if isinstance(error, MemoryError):
        return f"out of memory; {REMEDIES[errno.ENOMEM]}"
    number, file = (error.errno, error.filename2 or error.filename) if isinstance(error, OSError) else (None, None)
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if number is None or number in MISTAKES:
        return None
    remedy = REMEDIES.get(number, "the system refused it; put it right, and start again with the same settings")
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{f' for {file}' if file else ''}; {remedy}"
    return f"{f'{file}: ' if file else ''}{os.strerror(number)}; {remedy}"


def told(error: BaseException) -> tuple[int, Sequence[str]] | None:
    """Exit code and sentences for whatever ended the program, by what it is; None: a bug."""
    if isinstance(error, Refusal):
        return error.code, error.problems
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, ["interrupted"]
    if isinstance(error, BrokenPipeError):  # the reader of our lines is gone (| head)
        return 128 + signal.SIGPIPE, ["whatever read the output has closed it, and the run has ended with it"]
    if problem := of_machine(error):
        too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
        return SettingsError.code if too_long else MachineError.code, [problem]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and not isinstance(
        error, OSError
    ):  # a library that gets no memory says anything
        *_, cause = chain(error)
        limited = f"the address space is limited to {limit / 2**30:.1f} GiB (ulimit -v)"
        return MachineError.code, [f"{limited}, and a library did not go on ({first_line(cause)}); remove the limit"]
    return None


def first_line(error: BaseException) -> str:
    """What a library's error says, short enough for a sentence of ours, and without the secrets in its URLs."""
    if "trust_remote_code" in str(error):  # the library advises to set it, but here nobody can or should
        return "it needs code of its own, which this program never runs; take a model that transformers knows"
    return without_password((str(error).strip() or type(error).__name__).splitlines()[0])[:300]


def without_password(text: str) -> str:
    """The text without the user and password that a URL in it may hold: HF_ENDPOINT or a proxy as http://user:password@host."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def ours(error: BaseException) -> bool:
    """Whether our own code raised the error, and not a library that it called: the traceback ends in one of our files."""
    name, at = "", error.__traceback__
    while at is not None:
        name, at = at.tb_frame.f_globals.get("__name__", ""), at.tb_next
    return name.partition(".")[0] in ("finetune", "entrypoint", "__main__")


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised for: libraries wrap what happened into what they wanted."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


class Refusal(Exception):
    """The run cannot go on, for a reason the user can remove. `problems` are whole sentences that name the remedy."""

    code = 1

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems: Sequence[str] = problems


class NotReproduced(Refusal):
    """A recorded run, made again, gave other weights."""


class Diverged(Refusal):
    """The loss, or the gradient, is no longer a number."""


class SettingsError(Refusal):
    """A value, a name or a file that a setting points to is wrong."""

    code = 2


class MachineError(Refusal):
    """The machine cannot do what was asked: no GPU, driver too old, memory or disk full, a folder that cannot be written."""

    code = 3


class HubError(Refusal):
    """The Hub, or the way to it, refused. Nothing on disk is lost."""

    code = 4


class OutputError(Refusal):
    """The output folder does not hold what a run wrote there: files are damaged, missing, or not from a run."""

    code = 5


class MergeError(Refusal):
    """The written weights are not base + adapter. A bug, or a faulty disk: nothing is kept under the final name."""
