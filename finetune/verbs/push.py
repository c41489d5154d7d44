"""`push`: publish what an earlier run left in OUTPUT_DIR, after a check that every file is as the run wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune import sources
from finetune.run import folder
from finetune.settings import Settings
from finetune.sources import publish


def run(settings: Settings, environ: Mapping[str, str], _: str) -> None:
    sources.hub().login(settings, publishes=True)
    folder.verify(Path(settings.output_dir))
    publish.publish(settings, Path(settings.output_dir))
