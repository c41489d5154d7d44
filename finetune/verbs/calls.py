"""The verbs behind the entrypoint, each a function of the settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune import console
from finetune.inference import answer
from finetune.machine import preflight
from finetune.run import inputs, recipe
from finetune.settings import Settings
from finetune.sources import hub
from finetune.verbs import lock_inputs as pins
from finetune.verbs import reproduce, verify


def call(verb: str, settings: Settings, environ: Mapping[str, str], word: str | None) -> None:
    """Run `verb` with the word that some take. Raises Refusal where it cannot be done."""
    console.beat_in(Path(environ.get("FINETUNE_STATE_DIR") or "/tmp/finetune"), settings.health_timeout)
    if verb == "train":
        recipe.run(settings, environ)
    elif verb == "check":
        found = preflight.check(settings, preflight.gpus(environ), environ, missing=inputs.missing(settings))
        print(*found, "settings: all good", sep="\n")
    elif verb == "ask":
        answer.ask(word or "", settings)
    elif verb == "push":
        hub.login(settings)
        hub.publish(settings)
    elif verb == "reproduce":
        reproduce.run(Path(word or ""), settings, environ)
    elif verb == "lock-inputs":
        for line in pins.lock(settings, environ, Path(".env")):
            print(line, flush=True)
    elif verb == "verify":
        for line in verify.run(settings):
            print(line, flush=True)
