"""Where models and rows come from: this machine, or a hub. A further hub is one module and one entry in HUBS."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from finetune.errors import SettingsError
from finetune.settings import Settings
from finetune.sources import local
from finetune.sources.model import Source

if TYPE_CHECKING:
    from datasets import Dataset

    from finetune.sources.stream import Stream

HUBS = {"huggingface": "finetune.sources.huggingface"}


class Hub(Protocol):
    """What the module of a hub offers."""

    def login(self, settings: Settings, publishes: bool) -> None:
        """Print whose token it is.

        Raises HubError where the token is refused, or may not write and this call `publishes`.
        """

    def commit(self, variable: str, name: str, revision: str, settings: Settings) -> str:
        """The commit that the revision of a repository names now. variable: MODEL_NAME or DATASET_NAME."""

    def fetch(self, settings: Settings, weights: bool = True) -> Source:
        """MODEL_NAME's files, downloaded at the commit that MODEL_REVISION names now; or all but the weights."""

    def cached(self, name: str, commit: str) -> Source | None:
        """The model's files at that commit, without the network; None: they are not on this machine."""

    def dataset(self, settings: Settings, split: str) -> tuple[str | None, Dataset]:
        """All rows of a split of DATASET_NAME, and their commit; None: unknown."""

    def stream(self, settings: Settings, split: str) -> Stream:
        """As `dataset`, but the rows are read over the network when they are asked for."""


def hub() -> Hub:
    """The module of the hub, imported only now: its client takes 0.2 s, and `check` needs none."""
    found: Hub = importlib.import_module(HUBS["huggingface"])
    return found


def fetch_model(settings: Settings) -> Source:
    """The model's folder: a local one as it is, or a Hub repository downloaded at the commit its revision names now.

    The 16-bit repository is fetched once and serves both: quantised at load for training, read again by the merge.
    A quantised mirror would train on other weights than the merge adds to (unsloth #1089, peft #2321).

    Raises SettingsError where the name stands for no model that can be trained, HubError where the Hub does
    not give it.
    """
    if problem := local.missing(settings):
        raise SettingsError(problem)
    name = settings.model_name
    folder = Path(name).expanduser()
    source = Source(name, None, folder) if folder.is_dir() else hub().fetch(settings)
    if (source.folder / "adapter_config.json").is_file():
        # transformers would load it too, and the merge would add to the weights without it
        raise SettingsError(
            f"MODEL_NAME={name}: holds an adapter (adapter_config.json) beside the model, and it is not clear which of "
            "them is meant; name the model alone, or one that the adapter is merged into"
        )
    return source


def fetch_words(settings: Settings) -> Source:
    """The model's folder, of which the tokenizer is needed alone. Raises as `fetch_model`."""
    name = settings.model_name
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(name, None, folder)
    if problem := local.missing(settings):
        raise SettingsError(problem)
    return hub().fetch(settings, weights=False)


def cached(name: str, commit: str | None) -> Source | None:
    """A model that is on this machine already: a commit in the Hub's cache, or a folder; else None. No network."""
    if commit is not None and (source := hub().cached(name, commit)):
        return source
    folder = Path(name).expanduser()
    return Source(name, None, folder) if folder.is_dir() else None
