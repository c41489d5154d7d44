"""Weights & Biases, opened before training: where it cannot be reached, the run is kept on disk, and training goes on."""

from __future__ import annotations

import os
from typing import Any

import httpx

from finetune.errors import SettingsError, first_line
from finetune.settings import Settings

PATIENCE = 10.0  # seconds; wandb itself tries for 90, and then ends the run


def begin(settings: Settings) -> None:
    """Open the run that transformers' callback then takes. Raises SettingsError where the key is refused."""
    if settings.report_to != "wandb":
        return
    import wandb  # takes a second

    options: Any = wandb.Settings()
    if options.mode not in ("offline", "disabled") and (why := _unreached(options.base_url)):
        os.environ["WANDB_MODE"] = "offline"
        print(
            f"W&B: {options.base_url} cannot be reached ({why}). Training goes on, and its curves are kept in "
            f"{os.environ.get('WANDB_DIR', '.')}/wandb; `wandb sync` sends them later",
            flush=True,
        )
    try:
        wandb.init(project=os.environ.get("WANDB_PROJECT", "huggingface"))
    except Exception as error:
        raise SettingsError(
            f"WANDB_API_KEY: W&B does not take this run ({first_line(error)}); give another key, or REPORT_TO=none"
        ) from None


def _unreached(url: str) -> str | None:
    """Why nothing answers at the address; None: something does."""
    try:
        httpx.head(url, timeout=PATIENCE)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError) as error:
        return "no answer in time" if isinstance(error, httpx.TimeoutException) else first_line(error)
    return None
