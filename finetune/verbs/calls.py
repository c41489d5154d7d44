"""The verbs behind the entrypoint, each a function of the settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune import console
from finetune.machine import gpus
from finetune.run import folder, inputs
from finetune.settings import Settings


def call(verb: str, settings: Settings, environ: Mapping[str, str], word: str | None) -> None:
    """Run `verb` with the word that some take. Raises Refusal where it cannot be done."""
    console.beat_in(Path(environ.get("FINETUNE_STATE_DIR") or "/tmp/finetune"), settings.health_timeout)
    if verb == "train":
        from finetune.run import recipe

        recipe.run(settings, environ)
    elif verb == "check":
        print(*inputs.look(settings, gpus.gpus(environ), environ), "settings: all good", sep="\n")
    elif verb == "ask":
        from finetune.inference import answer

        answer.ask(word or "", settings)
    elif verb == "push":
        from finetune.sources import huggingface, publish

        huggingface.login(settings, publishes=True)
        folder.verify(Path(settings.output_dir))
        publish.publish(settings, Path(settings.output_dir))
    elif verb == "reproduce":
        from finetune.verbs import reproduce

        reproduce.run(Path(word or ""), settings, environ)
    elif verb == "lock-inputs":
        from finetune.verbs import lock_inputs as pins

        for line in pins.lock(settings, environ, Path(".env")):
            print(line, flush=True)
    elif verb == "verify":
        from finetune.verbs import verify

        for line in verify.run(settings):
            print(line, flush=True)
