#!/usr/bin/env python3
"""The container's entrypoint: reads the environment, runs one verb, sets the exit code. See `--help`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

if __name__ == "__main__" and (sys.flags.optimize or sys.flags.safe_path):
    # the libraries rely on asserts and docstrings, and the import below on this file's folder in the path
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONOPTIMIZE", "PYTHONSAFEPATH")}
    os.execve(sys.executable, [sys.executable, __file__, *sys.argv[1:]], plain)

from finetune import __version__, console, environment
from finetune.errors import MachineError, told
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
    console.guard()
    signals.listen()
    known: list[str] = []  # secrets, to be kept out of a traceback
    try:
        run(table.parse(argv), environ, known)
        sys.stdout.flush()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        code, problems = told(error) or (1, console.bug(error, known))
        console.leave(problems, lost=isinstance(error, OSError))
        return code


def run(call: table.Call, environ: Mapping[str, str], known: list[str]) -> None:
    """Run the verb. known: takes the secrets as soon as they are read."""
    if not os.path.exists(os.readlink("/proc/self/cwd")):
        raise MachineError("the folder in which this was started has been deleted; start it in one that exists")
    settings = None if call.verb.source == "none" else settle(call, environ)
    known += settings.secrets() if settings else []
    importlib.import_module(call.verb.module).run(settings, os.environ, call.word)


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
