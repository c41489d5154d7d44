"""A model on disk: which of its folder's files count, and their hashes."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import threading
from collections.abc import Collection
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from finetune import files
from finetune.errors import SettingsError

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# what AutoProcessor reads beside the tokenizer, of models that take pictures or sound
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """What a name stood for when it was loaded. commit: of the Hub repository, None for a folder."""

    name: str
    commit: str | None
    folder: Path

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of each file that decides what is trained on and merged into, under its name.

        They identify a model wherever its folder is. A folder's files are read each time, and are then in memory for
        loading; those of the Hub's cache are read once. Raises HubError where one of these is not what the Hub names
        it.
        """
        return self.hashing.result()

    @functools.cached_property
    def hashing(self) -> Future[dict[str, str]]:
        """`digests`, begun in a thread: 16 GB take seconds, in which the libraries can be imported."""
        future: Future[dict[str, str]] = Future()

        def work() -> None:
            try:
                future.set_result(self._digests())
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def _digests(self) -> dict[str, str]:
        fixed = ("config.json", "generation_config.json", *TOKENIZER_FILES, *PROCESSOR_FILES)
        names = (*weight_files(self.folder), *fixed)
        return self.check([name for name in names if (self.folder / name).is_file()])

    def check(self, names: Collection[str]) -> dict[str, str]:
        """sha256 of these files. Raises HubError where it is known what they have to be, and they are not."""
        return files.digests(self.folder, names)

    def config(self) -> dict[str, Any]:
        """The model's config.json; {} where there is none."""
        return read_object(self.folder / "config.json")  # whoever loads the model says what is wrong


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def weight_files(folder: Path) -> list[str]:
    """Names of a model folder's weight files.

    Raises SettingsError where there are none, or where the index names one that is not there.

    Of several forms it is the one that transformers loads: what is trained and what is merged into must be the same
    weights.
    """
    for first in ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"):
        if not (folder / first).is_file():
            continue
        if not first.endswith(".index.json"):
            return [first]
        try:
            listed = set(json.loads((folder / first).read_text(encoding="utf-8"))["weight_map"].values())
            names = sorted(os.fspath(name) for name in listed)  # raises TypeError for what is no name
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise SettingsError(
                f"MODEL_NAME={folder}: {first} is no list of weight files; download or copy the model again"
            ) from None
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise SettingsError(f"MODEL_NAME={folder}: lacks {', '.join(missing)}; download or copy the model again")
        return names
    raise SettingsError(f"MODEL_NAME={folder}: has no model.safetensors and no index of one")
