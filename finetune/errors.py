"""The refusals a user can meet. Each carries the exit code of the process and every problem found, at once."""

from __future__ import annotations

from collections.abc import Sequence


def first_line(error: Exception) -> str:
    """What a library's error says, short enough to stand within a sentence of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class Refusal(Exception):
    """The run cannot go on, for a reason the user can remove. `problems` are whole sentences that name the remedy."""

    code = 1

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems: Sequence[str] = problems


class NotReproduced(Refusal):
    """A recorded run, made again, gave other weights."""


class SettingsError(Refusal):
    """A value, a name or a file that a setting points to is wrong."""

    code = 2


class PreflightError(Refusal):
    """The machine cannot do what was asked: no GPU, driver too old, no disk space, a folder that cannot be written."""

    code = 3


class HubError(Refusal):
    """The Hub, or the way to it, refused. Nothing on disk is lost."""

    code = 4


class MergeError(Refusal):
    """The written weights are not base + adapter. A bug, or a disk that lies: nothing is kept under the final name."""
