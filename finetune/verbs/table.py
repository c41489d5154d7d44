"""The command line: a verb, the one word that some verbs take, and settings as NAME=value."""

from __future__ import annotations

import dataclasses

from finetune.errors import SettingsError

USAGE = """usage: entrypoint.py [VERB] [NAME=value ...]

  train               fine-tune, verify, record; push where PUSH_TO_HUB=1 (the default verb)
  check               settings, GPU, driver, memory, disk; downloads nothing
  ask QUESTION        answer with the trained model in OUTPUT_DIR
  push                publish what an earlier run left in OUTPUT_DIR; needs no GPU
  verify [FOLDER]     check every file in FOLDER, else OUTPUT_DIR: its hash, and that merged is base + adapter; needs no GPU
  reproduce RUN_JSON  train as that record says, in a folder of its own, and compare the bytes
  lock-inputs         write the commits that MODEL_REVISION and DATASET_REVISION name now into .env
  env                 all settings, with their defaults
  anything else       is run as a command: docker run IMAGE bash

Settings come from NAME=value here, then the environment, then .env, then the defaults; empty means unset. `reproduce` takes
them from the record and from NAME=value here alone.
Exit codes: 0 done; 2 settings; 3 this machine (GPU, driver, disk, memory); 4 the Hub; 1 a bug, training that diverged, or not
reproduced; 143 and 130 stopped by SIGTERM or SIGINT, during training with a checkpoint on disk."""

VERBS = ("train", "check", "ask", "push", "verify", "reproduce", "lock-inputs", "env")
# what the verbs that need a word need, with an example
NEEDED = {
    "ask": "the question, for example: ask 'What does a raised troponin mean?'",
    "reproduce": "the record of a run, for example: reproduce outputs/run.json",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """What was typed. word: a question, a run.json; line: settings, which win over the environment."""

    verb: str
    word: str | None
    line: dict[str, str]


def verb_of(argv: list[str]) -> str:
    """The first word, or `train` where settings come first or nothing was typed."""
    return "train" if not argv or "=" in argv[0].split("/")[0] else argv[0]


def parse(argv: list[str]) -> Command:
    """Take `argv` apart; its verb is one of VERBS. Raises SettingsError that names the first word that has no meaning."""
    verb, words = verb_of(argv), [*argv]
    if words and words[0] == verb:
        del words[0]
    if verb in NEEDED:
        if not words or not words[0] or (verb != "ask" and "=" in words[0].split("/")[0]):
            raise SettingsError(f"{verb}: needs {NEEDED[verb]}")
        word: str | None = words.pop(0)
    else:
        word = None
        if verb == "verify" and words and "=" not in words[0].split("/")[0]:
            words[0] = f"OUTPUT_DIR={words[0]}"
    if wrong := [given for given in words if "=" not in given]:
        raise SettingsError(f"{wrong[0]}: not understood; settings are given as NAME=value, for example MAX_STEPS=60")
    line = dict(given.split("=", 1) for given in words)
    return Command(verb, word, line | ({"PUSH_TO_HUB": "1"} if verb == "push" else {}))
