"""The verbs, each in one line here and one file beside this one. Usage, parsing, dispatch and README's table come from `VERBS`.

A verb's file has `run(settings, environ, word)`. It is imported when the verb is called, once the settings are known to be good:
`--help`, `env` and a refused setting answer without torch.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from finetune.errors import SettingsError
from finetune.settings import declarations


@dataclasses.dataclass(frozen=True)
class Verb:
    """word: what stands behind the verb, in brackets where it may be left out. example: of a word that it needs.

    setting: which setting the word is, where it is one. make: how make calls it, where that differs from the name.
    source: where settings come from: everywhere, or the record of a run and the command line alone, or the verb takes none.
    publishes: whether the settings have to be enough to publish with.
    """

    name: str
    help: str
    word: str = ""
    example: str = ""
    setting: str | None = None
    make: str | None = None
    source: Literal["everywhere", "record", "none"] = "everywhere"
    publishes: bool = False

    @property
    def module(self) -> str:
        return f"finetune.verbs.{self.name.replace('-', '_')}"

    @property
    def typed(self) -> str:
        """The verb as it is typed."""
        return f"{self.name} {self.word}".rstrip()


VERBS = {
    verb.name: verb
    for verb in (
        Verb("train", "fine-tune, verify, record; publish where PUSH_TO_HUB=1 (the default verb)"),
        Verb("check", "look at settings, GPU, driver, memory and disk; downloads nothing"),
        Verb(
            "selftest", "compute on this GPU with all that a run uses, and compare; downloads nothing, under a minute"
        ),
        Verb(
            "data",
            "look at the rows before training: lengths, what is cut, near-duplicates, rows as they are trained; needs no GPU",
        ),
        Verb(
            "ask",
            "answer with the trained model in OUTPUT_DIR",
            word="QUESTION",
            example="ask 'What does a raised troponin mean?'",
            make='ask Q="…"',
        ),
        Verb(
            "eval",
            "measure base, adapter and merged weights in OUTPUT_DIR on rows that were not trained; trains nothing",
        ),
        Verb(
            "push",
            "publish what an earlier run left in OUTPUT_DIR; needs no GPU",
            make="push-hub",
            publishes=True,
        ),
        Verb(
            "verify",
            "check every file against run.json, and the merged weights against base + adapter; needs no GPU",
            word="[FOLDER]",
            setting="OUTPUT_DIR",
        ),
        Verb(
            "reproduce",
            "train again as the record says, in a folder of its own, and compare the bytes",
            word="RUN_JSON",
            example="reproduce outputs/run.json",
            make="reproduce RUN=…",
            source="record",
        ),
        Verb("lock-inputs", "write the commits that MODEL_REVISION and DATASET_REVISION name now into .env"),
        Verb("env", "print all settings, with their defaults", make="", source="none"),
    )
}
EXIT_CODES = {
    "0": "done",
    "2": "settings",
    "3": "this machine (GPU, driver, disk, memory)",
    "4": "the Hub",
    "5": "a damaged or foreign output folder",
    "1": "a bug, training that diverged, or not reproduced",
    "143, 130 and 129": "stopped by SIGTERM, SIGINT or SIGHUP, during training with a checkpoint on disk",
    "137": "killed, most often because the host's memory ran out",
}


def usage() -> str:
    """The text of `--help`."""
    lines = [f"  {verb.typed:18}  {verb.help}" for verb in VERBS.values()]
    codes = [f"  {code:16}  {meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(
        [
            "usage: entrypoint.py [VERB] [NAME=value ...]",
            "",
            *lines,
            "  anything else       is run as a command: docker run IMAGE bash (of the name of a verb: /usr/bin/env)",
            "",
            "Settings come from NAME=value here, then the environment, then .env, then the defaults; empty means unset.",
            "`reproduce` takes them from the record and from NAME=value here alone.",
            "",
            "Exit codes:",
            *codes,
        ]
    )


def readme() -> str:
    """README's table of verbs."""
    rows = ["| verb | make | |", "| --- | --- | --- |"]
    for verb in VERBS.values():
        made = verb.name if verb.make is None else verb.make
        rows.append(f"| `{verb.typed}` | {f'`{made}`' if made else ''} | {verb.help} |")
    return "\n".join(rows) + "\n"


@dataclasses.dataclass(frozen=True)
class Call:
    """What was typed. word: a question, a run.json; line: settings, which win over the environment."""

    verb: Verb
    word: str
    line: dict[str, str]


def verb_of(argv: list[str]) -> str:
    """The first word, or `train` where settings come first or nothing was typed."""
    return "train" if not argv or _is_setting(argv[0]) else argv[0]


def parse(argv: list[str]) -> Call:
    """Take `argv` apart; its verb is one of VERBS. Raises SettingsError that names the first word that has no meaning."""
    verb, words, word = VERBS[verb_of(argv)], [*argv], ""
    if words and words[0] == verb.name:
        del words[0]
    # a question may hold a =, and a path too, behind a slash
    if verb.word and words and words[0] and (verb.word == "QUESTION" or not _is_setting(words[0])):
        word = words.pop(0)
    elif verb.example:
        raise SettingsError(f"{verb.name}: needs {verb.word}, for example: {verb.example}")
    if wrong := [given for given in words if "=" not in given]:
        raise SettingsError(
            f"{wrong[0] or 'an empty word'}: not understood; settings are given as NAME=value, for example MAX_STEPS=60"
        )
    line = dict(given.split("=", 1) for given in words)
    return Call(verb, word, {verb.setting: word, **line} if verb.setting and word else line)


def meant(word: str) -> str:
    """What was probably meant by a word that is no verb."""
    import difflib  # takes some milliseconds, and only a mistake needs it

    if word.upper() in (names := {d.name for d in declarations()}):
        return f"a setting is given with its value, for example {word.upper()}=…"
    if near := difflib.get_close_matches(word.lower(), VERBS, 1, 0.6):
        return f"did you mean {near[0]}?"
    if near := difflib.get_close_matches(word.upper(), names, 1, 0.75):
        return f"did you mean the setting {near[0]}=…?"
    return f"the verbs are {', '.join(VERBS)}"


def _is_setting(word: str) -> bool:
    return "=" in word.split("/")[0]
