"""`env`: all settings, with their defaults, as lines for a .env file."""

from __future__ import annotations

from finetune.settings import reference


def run(*_: object) -> None:
    print(reference(), end="")
