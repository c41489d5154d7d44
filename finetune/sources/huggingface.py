"""The Hugging Face Hub: whose token it is, a model's files at one commit, the rows of a data set."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download

from finetune import files
from finetune.errors import HubError, Refusal, SettingsError, first_line, without_password
from finetune.settings import Settings
from finetune.sources import blobs
from finetune.sources.client import talk, token
from finetune.sources.model import Source
from finetune.sources.quantised import quantised
from finetune.sources.session import NETWORK, Unreached

if TYPE_CHECKING:
    from datasets import Dataset

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
OLD_WEIGHTS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
TEXTS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
EXCLUDED = ["*/*", "consolidated*"]  # other forms of the same weights
COMMIT = "[0-9a-f]{40}"


@dataclasses.dataclass(frozen=True)
class Cached(Source):
    """A model in the Hub's cache. mends: a file with a wrong hash is removed, and the next run downloads it."""

    mends: bool = False

    def check(self, names: Collection[str]) -> dict[str, str]:
        """sha256 of these files. Raises HubError with each that is not what the Hub names it."""
        paths = {name: (self.folder / name).resolve() for name in names}
        again = f"the same command downloads it again{' without HF_HUB_OFFLINE' if constants.is_offline_mode() else ''}"
        found = blobs.read(self.folder.parent.parent, paths.values())
        problems = []
        for name, path in paths.items():
            blob = found[path]
            if blob.found == blob.named:
                continue
            if self.mends:
                files.remove(self.folder / name, ignore_errors=True)
                files.remove(path, ignore_errors=True)
            way_out = f"Remove {path}" if os.path.lexists(path) else "It is removed"
            problems.append(
                f"MODEL_NAME={self.name}: {name} is not the file that the Hub has: its hash is {blob.found}, expected "
                f"was {blob.named}. A mirror, a proxy or a disk has changed "
                f"it{f'. {way_out}, and {again}' if self.mends else ''}"
            )
        if problems:
            raise HubError(*problems)
        return {name: found[path].sha256 for name, path in paths.items()}


def login(settings: Settings, publishes: bool) -> None:
    """Where there is a token, ask the Hub whose it is, and print name and rights. Nothing is written to disk.

    Raises HubError where the token is refused, or may not write although this call `publishes`. Where the Hub cannot be
    reached and nothing is published, the run goes on: what it needs may be in the cache.
    """
    if settings.hf_token is None:
        return
    if constants.is_offline_mode():
        if publishes:
            raise HubError(
                "HF_HUB_OFFLINE=1: publishing needs the Hub; unset it, or train with PUSH_TO_HUB=0 and `push` later"
            )
        print("Hub: offline, the token is not checked", flush=True)
        return
    try:
        answer = talk("HF_TOKEN", "<SECRET>", HfApi(token=token(settings)).whoami)
    except Unreached as error:
        if publishes:
            raise
        print(f"the token is not checked, and the run goes on with what is here: {error}", flush=True)
        return
    if not isinstance(answer, dict) or not isinstance(answer.get("name"), str):
        raise HubError(f"HF_TOKEN=<SECRET>: the Hub says nothing of an account. {NETWORK}.")
    rights = "read and write" if (writes := may_write(answer)) else "only read"
    print(f"Hub: logged in as {answer['name']}; the token may {rights}", flush=True)
    if publishes and not writes:
        raise HubError(
            "HF_TOKEN: publishing needs the right to write, and this token may only read. Make one with the right to "
            "write in the Hub's settings, Access Tokens, and give it in HF_TOKEN."
        )


def may_write(whoami: dict[str, Any]) -> bool:
    """Whether whoami's answer tells of a token that may write to some repository."""
    access = whoami.get("auth", {}).get("accessToken", {})
    if access.get("role") != "fineGrained":
        return access.get("role") == "write"
    scopes = access.get("fineGrained", {})
    scoped = (right for scope in scopes.get("scoped", []) for right in scope.get("permissions", []))
    return "repo.write" in [*scopes.get("global", []), *scoped]


def commit(variable: str, name: str, revision: str, settings: Settings) -> str:
    """The commit that the revision of a repository names now. variable: MODEL_NAME or DATASET_NAME."""
    if constants.is_offline_mode():
        raise HubError(f"{variable}={name}: HF_HUB_OFFLINE is set, and only the Hub knows what {revision} names now")
    kind = {"MODEL_NAME": "model", "DATASET_NAME": "dataset"}[variable]
    ask = functools.partial(HfApi(token=token(settings)).repo_info, name, revision=revision, repo_type=kind)
    found = str(talk(variable, name, ask, revision).sha)
    if not re.fullmatch(COMMIT, found):
        raise HubError(f"{variable}={name}: the Hub says nothing of a commit. {NETWORK}.")
    return found


def fetch(settings: Settings, weights: bool = True) -> Cached:
    """MODEL_NAME's files, downloaded at the commit that MODEL_REVISION names now. weights: whether these too.

    All files but the weights are checked here. The weights are checked later by `digests`, while the libraries are
    imported.
    """
    name, revision = settings.model_name, settings.model_revision
    asked: dict[str, Any] = dict(repo_id=name, token=token(settings))

    def config() -> Path | None:
        try:
            return Path(hf_hub_download(filename="config.json", revision=revision, **asked))
        except errors.RemoteEntryNotFoundError:
            return None

    if (found := talk("MODEL_NAME", name, config, revision)) is None:
        raise SettingsError(
            f"MODEL_NAME={name}: has no config.json, so it is no model that can be trained (GGUF files, or an "
            "adapter alone); name the model that it was made of, in 16 bits"
        )
    source = Cached(name, found.parent.name, found.parent, mends=True)
    source.check(["config.json"])
    if not source.config():
        raise HubError(f"MODEL_NAME={name}: config.json, as the Hub has it, is no object in JSON; name another model")
    if weights and (problem := quantised(source)):  # refused now, and not after 40 GB were downloaded
        raise SettingsError(problem)
    asked.update(revision=source.commit, ignore_patterns=EXCLUDED)  # so that all files are of the same commit
    # huggingface_hub before 1.3x kept no list of a commit's files in its cache, and offline none can be asked for
    asked.update(local_files_only=constants.is_offline_mode())
    for patterns in (WEIGHTS, OLD_WEIGHTS) if weights else ((),):
        download = functools.partial(snapshot_download, **asked, allow_patterns=[*patterns, *TEXTS])
        talk("MODEL_NAME", name, download, revision)
        if any(source.folder.glob("*.safetensors")):
            break
    if weights and not any(source.folder.glob("*.safetensors")) and not any(source.folder.glob("pytorch_model*.bin")):
        raise SettingsError(
            f"MODEL_NAME={name}: holds no safetensors or pytorch weights (GGUF and the like cannot be trained)"
        )
    names = sorted(path.name for path in source.folder.iterdir() if path.is_file())
    source.check([name for name in names if not name.endswith((".safetensors", ".bin"))])
    return source


def cached(name: str, commit: str) -> Cached | None:
    """The model's files at that commit, without the network; None: they are not in the cache."""
    look = functools.partial(snapshot_download, name, revision=commit, local_files_only=True, token=False)
    with contextlib.suppress(HubError, SettingsError):
        return Cached(name, commit, Path(talk("MODEL_NAME", name, look)))
    return None


def dataset(settings: Settings, split: str) -> tuple[str | None, Dataset]:
    """All rows of a split of DATASET_NAME, and the commit that DATASET_REVISION names now; None: unknown.

    Raises SettingsError where the repository holds no such rows, HubError where the Hub does not give them.
    """
    import datasets  # takes 0.8 s, and most verbs need none

    name, config, revision = settings.dataset_name, settings.dataset_config, settings.dataset_revision
    known = token(settings)
    if not constants.is_offline_mode():
        revision = commit("DATASET_NAME", name, revision, settings)
    load = functools.partial(datasets.load_dataset, name, config, split=split, revision=revision, token=known)
    found = talk("DATASET_NAME", name, load, revision, functools.partial(_not_rows, settings, revision))
    return (_taken_offline(found, revision, name) if constants.is_offline_mode() else revision), found


def _not_rows(settings: Settings, revision: str, error: Exception) -> Refusal:
    """The refusal where `datasets` makes no rows of what the Hub gave."""
    import datasets
    from datasets.table import CastError

    name, said = settings.dataset_name, first_line(error)
    if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
        return SettingsError(f"DATASET_CONFIG={settings.dataset_config or ''}: {said}")
    if isinstance(error, ValueError) and "split" in str(error).lower():
        place = dict(revision=revision, token=token(settings))
        ask = functools.partial(datasets.get_dataset_split_names, name, settings.dataset_config, **place)
        splits = talk("DATASET_NAME", name, ask, revision)
        return SettingsError(
            f"DATASET_SPLIT={settings.dataset_split}: {name} has {', '.join(splits)}, for example "
            f"DATASET_SPLIT={splits[0]}"
        )
    # it says "An error occurred while generating"; its cause says which
    behind = error.__cause__ if isinstance(error.__cause__, Exception) else error
    said = f"its files differ in columns: {behind.details()}" if isinstance(behind, CastError) else first_line(behind)
    return SettingsError(
        f"DATASET_NAME={name}: cannot be read as a data set ({without_password(said)}). Name one of its configurations "
        "in DATASET_CONFIG, or download its files of rows and give their path, for example DATASET_NAME=./rows.jsonl"
    )


def _taken_offline(found: Dataset, asked: str, name: str) -> str | None:
    """The commit that was loaded without the Hub; None: unknown. Raises HubError where it is not the one asked for.

    Offline, datasets takes the newest that it has, whatever revision is asked for; its folder tells which one that was.
    """
    taken = next((Path(file["filename"]).parent.name for file in found.cache_files), "")
    if not re.fullmatch(COMMIT, taken):
        return asked if re.fullmatch(COMMIT, asked) else None
    if re.fullmatch(COMMIT, asked) and taken != asked:
        raise HubError(
            f"DATASET_REVISION={asked}: is not in the cache, which has {taken} of {name}, and HF_HUB_OFFLINE is set; "
            "load it once with the network"
        )
    return taken
