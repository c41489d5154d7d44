#!/usr/bin/env python3
"""The container's entrypoint: reads the environment, runs one verb, sets the exit code. See `--help`."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from finetune import __version__, console, environment
from finetune.errors import Refusal, of_machine
from finetune.machine import launcher, limits, signals
from finetune.settings import Settings
from finetune.verbs import table


def main(argv: list[str], environ: Mapping[str, str]) -> int:
    """Run one verb and return the exit code."""
    verb = table.verb_of(argv)
    if verb in ("-h", "--help", "help", "--version"):
        print(__version__ if verb == "--version" else table.usage())
        return 0
    if verb not in table.VERBS:
        return execute(argv, environ)
    signals.listen()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no such letters is no reason to stop
    try:
        call = table.parse(argv)
        settings = None if call.verb.source == "none" else settle(call, environ)
        importlib.import_module(call.verb.module).run(settings, os.environ, call.word)
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


def settle(call: table.Call, environ: Mapping[str, str]) -> Settings:
    """The settings of a call. The libraries are told of theirs in the process's environment."""
    layered, line = environment.layered(environment.dotenv(Path(".env")), environ), call.line
    layered = launcher.alone(layered, os.environ)
    if call.verb.source == "record":
        from finetune.run import restore  # imports pydantic: not for `--help`

        layered, line = restore.restore(Path(call.word), layered, line)
        for name in environment.NUMERIC:
            os.environ.pop(name, None)
    settings = Settings.from_env(layered, line, publishes=call.verb.publishes)
    os.environ.update(environment.variables(settings, layered, limits.cpus()))
    console.hush()
    console.beat_in(Path(os.environ.get("FINETUNE_STATE_DIR") or "/tmp/finetune"), settings.health_timeout)
    return settings


def execute(argv: list[str], environ: Mapping[str, str]) -> int:
    """Become another command; the exit codes for a command that cannot run are the shell's."""
    try:
        os.execvpe(argv[0], argv, dict(environ))
    except (OSError, ValueError) as error:  # ValueError: an empty word, as a variable without a value gives it
        why = error.strerror if isinstance(error, OSError) else "an empty word"
        print(f"error: {argv[0]}: neither a verb nor a command ({why}); {table.meant(argv[0])}", file=sys.stderr)
        return 127 if isinstance(error, (FileNotFoundError, ValueError)) else 126


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
