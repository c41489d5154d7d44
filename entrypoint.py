#!/usr/bin/env python3
"""The container's entrypoint: reads the environment, runs one verb, sets the exit code. See `--help`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from finetune import __version__, libraries
from finetune.errors import Refusal, SettingsError
from finetune.settings import Settings, reference

USAGE = """usage: entrypoint.py [VERB] [NAME=value ...]

  train            fine-tune, verify, record; push where PUSH_TO_HUB=1 (the default verb)
  check            settings, GPU, driver, memory, disk; downloads nothing
  ask QUESTION     answer with the trained model in OUTPUT_DIR
  push             publish what an earlier run left in OUTPUT_DIR; needs no GPU
  verify           check every file in OUTPUT_DIR against its run.json
  env              all settings, with their defaults
  anything else    is run as a command: docker run IMAGE bash

Settings come from NAME=value here, then the environment, then .env, then the defaults; empty means unset.
Exit codes: 0 done, 2 settings, 3 this machine, 4 the Hub, 1 a bug, 143 stopped by SIGTERM with a checkpoint on disk."""
VERBS = ("train", "check", "ask", "push", "verify", "env")


def main(argv: list[str], environ: Mapping[str, str]) -> int:
    """Run one verb and return the exit code."""
    settings_first = not argv or "=" in argv[0].split("/")[0]
    verb, words = ("train", argv) if settings_first else (argv[0], argv[1:])
    if verb in ("-h", "--help", "help", "--version"):
        print(__version__ if verb == "--version" else USAGE)
        return 0
    if verb not in VERBS:
        return execute(argv, environ)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run(verb, words, environ)
    except Refusal as refusal:
        print(*(f"error: {problem}" for problem in refusal.problems), sep="\n", file=sys.stderr)
        return refusal.code
    return 0


def run(verb: str, words: list[str], environ: Mapping[str, str]) -> None:
    """Resolve the settings, tell the libraries, and call the verb's function."""
    if verb == "env":
        return print(reference(), end="")
    question = words.pop(0) if verb == "ask" and words else None
    if wrong := [word for word in words if "=" not in word]:
        raise SettingsError(f"{wrong[0]}: not understood; settings are given as NAME=value, for example MAX_STEPS=60")
    if verb == "ask" and not question:
        raise SettingsError("ask: needs the question, for example: ask 'What does a raised troponin mean?'")
    line = dict(word.split("=", 1) for word in words)
    line |= {"PUSH_TO_HUB": "1"} if verb == "push" else {}
    layered = libraries.layers(libraries.dotenv(Path(".env")), environ)
    settings = Settings.from_env(layered, line)
    os.environ.update(libraries.variables(settings, layered))
    from finetune import verbs

    verbs.call(verb, settings, os.environ, question)


def execute(argv: list[str], environ: Mapping[str, str]) -> int:
    """Become another command; the exit codes for a command that cannot run are the shell's."""
    try:
        os.execvpe(argv[0], argv, dict(environ))
    except OSError as error:
        print(
            f"error: {argv[0]}: neither a verb ({', '.join(VERBS)}) nor a command ({error.strerror})", file=sys.stderr
        )
        return 127 if isinstance(error, FileNotFoundError) else 126


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
