"""`check`: can this machine make the run that the settings ask for? Nothing is downloaded, and torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.machine import cuda
from finetune.run import inputs
from finetune.settings import Settings


def run(settings: Settings, environ: Mapping[str, str], _: str) -> None:
    print(*inputs.look(settings, cuda.visible(environ), environ), "settings: all good", sep="\n")
