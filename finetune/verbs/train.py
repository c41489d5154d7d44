"""`train`: the whole run."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.run import recipe
from finetune.settings import Settings


def run(settings: Settings, environ: Mapping[str, str], _: str) -> None:
    recipe.run(settings, environ)
