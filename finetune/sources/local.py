"""Names that are no names on a hub: a model's folder on this machine, a path that is not there, a URL."""

from __future__ import annotations

import os
import re
from pathlib import Path

from finetune.errors import SettingsError, without_password
from finetune.settings import Settings
from finetune.sources.model import Source, weight_files
from finetune.sources.quantised import quantised

# Hub names do not end like this; a URL that does leads to a file
FILES = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".zst", ".zip", ".txt", ".gguf", ".safetensors", ".bin")


def missing(settings: Settings) -> str | None:
    """What is wrong with a MODEL_NAME that is a path, in a sentence; None: nothing, or it is a name on the Hub."""
    name = settings.model_name
    folder = Path(name).expanduser()
    if problem := url("MODEL_NAME", name):
        return problem
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            return f"MODEL_NAME={name}: the folder has no config.json, so it is not a model's folder"
        if problem := quantised(Source(name, None, folder)):
            return problem
        try:
            weight_files(folder)
        except SettingsError as error:
            return str(error)
        return None
    if os.path.exists(folder):
        return f"MODEL_NAME={name}: is a file; it takes a model's folder or a Hub name such as owner/name"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"MODEL_NAME={name}: there is no such folder; it takes a folder or a Hub name such as owner/name"
    return None


def url(variable: str, value: str) -> str | None:
    """The sentence for a URL where a name or a path is wanted; None: it is none."""
    if not (parts := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://([^?#]*)", value)):
        return None
    shown = without_password(parts[0])  # what follows a question mark may be a key
    scheme, place = parts[1].lower(), shown.partition("://")[2].rstrip("/")
    if scheme == "file":
        return f"{variable}={shown}: is a URL; give the path alone, for example {variable}={place}"
    repository = re.split(r"/(?:tree|blob|resolve|raw|viewer)(?:/|$)|@", place)[0].split("/")[scheme != "hf" :][-2:]
    what = "is a URL; it takes a Hub name or a path on this machine"
    if scheme in ("http", "https", "hf") and len(repository) == 2 and Path(repository[1]).suffix.lower() not in FILES:
        return (
            f"{variable}={shown}: {what}. For a repository of the Hub give owner and name, for example "
            f"{variable}={'/'.join(repository)}"
        )
    example = repository[-1] if repository else "rows.jsonl"
    return f"{variable}={shown}: {what}. Download it, and give its path, for example {variable}=./{example}"
