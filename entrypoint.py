#!/usr/bin/env python3
"""The container's entrypoint: reads the environment, runs one verb, sets the exit code. See `--help`."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from finetune import __version__
from finetune import environment as libraries
from finetune.errors import Refusal, of_machine
from finetune.settings import Settings, reference
from finetune.verbs import table as command


def main(argv: list[str], environ: Mapping[str, str]) -> int:
    """Run one verb and return the exit code."""
    verb = command.verb_of(argv)
    if verb in ("-h", "--help", "help", "--version"):
        print(__version__ if verb == "--version" else command.USAGE)
        return 0
    if verb not in command.VERBS:
        return execute(argv, environ)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no such letters is no reason to stop
    try:
        run(command.parse(argv), environ)
        return 0
    except Refusal as refusal:
        code, problems = refusal.code, refusal.problems
    except KeyboardInterrupt:
        code, problems = 128 + signal.SIGINT, ["interrupted"]
    except BrokenPipeError:  # the reader of our lines is gone (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains once more when it ends
        code, problems = 128 + signal.SIGPIPE, ["whatever read the output has closed it, and the run has ended with it"]
    except OSError as error:
        if (problem := of_machine(error)) is None:
            raise
        code, problems = 3, [problem]
    print(*(f"error: {problem}" for problem in problems), sep="\n", file=sys.stderr)
    return code


def run(asked: command.Command, environ: Mapping[str, str]) -> None:
    """Resolve the settings, tell the libraries, and call the verb's function."""
    if asked.verb == "env":
        return print(reference(), end="")
    layered, line = libraries.layers(libraries.dotenv(Path(".env")), environ), asked.line
    if asked.verb == "reproduce":
        from finetune.verbs import reproduce

        layered, line = reproduce.restore(Path(asked.word or ""), layered, line)
        for name in libraries.NUMERIC:
            os.environ.pop(name, None)
    settings = Settings.from_env(layered, line)
    os.environ.update(libraries.variables(settings, layered))
    from finetune.verbs import calls as verbs

    verbs.call(asked.verb, settings, os.environ, asked.word)


def execute(argv: list[str], environ: Mapping[str, str]) -> int:
    """Become another command; the exit codes for a command that cannot run are the shell's."""
    try:
        os.execvpe(argv[0], argv, dict(environ))
    except (OSError, ValueError) as error:  # ValueError: an empty word, as a variable without a value gives it
        verbs = ", ".join(command.VERBS)
        why = error.strerror if isinstance(error, OSError) else "an empty word"
        print(f"error: {argv[0]}: neither a verb ({verbs}) nor a command ({why})", file=sys.stderr)
        return 127 if isinstance(error, (FileNotFoundError, ValueError)) else 126


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
