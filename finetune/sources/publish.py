"""What a run left goes to the Hub: each folder with its card, in one commit."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi

from finetune.errors import HubError, MachineError, SettingsError, without_password
from finetune.settings import Settings
from finetune.sources.client import talk, token


def publish(settings: Settings, output: Path) -> None:
    """Push `output`/adapter to HUB_MODEL_ID, and `output`/merged to HUB_MERGED_MODEL_ID where that is set.

    output: a run's folder, whose files the caller has checked against their hashes. Raises HubError, with everything
    still on disk, and SettingsError where a folder is not there.
    """
    api = HfApi(token=token(settings))
    for folder, variable, repository in (
        ("adapter", "HUB_MODEL_ID", settings.hub_model_id),
        ("merged", "HUB_MERGED_MODEL_ID", settings.hub_merged_model_id),
    ):
        if repository is None:
            continue
        if not (output / folder).is_dir():
            raise SettingsError(
                f"{output / folder}: is not there, so {variable} cannot be published; train first, or unset {variable}"
            )
        with _goes_on(settings, output):
            create = functools.partial(api.create_repo, repository, private=settings.hub_private_repo, exist_ok=True)
            full = talk(variable, repository, create).repo_id
            print(f"Hub: publishing {folder} to {full}", flush=True)
            upload = functools.partial(api.upload_folder, repo_id=full, folder_path=output / folder)
            # it leaves out what is there already, so it can be repeated
            talk(variable, repository, functools.partial(upload, commit_message=f"Upload {folder}"))
            print(f"published: {without_password(api.endpoint)}/{full}", flush=True)


@contextlib.contextmanager
def _goes_on(settings: Settings, output: Path) -> Iterator[None]:
    """Add to a refusal how to publish later: all that was asked for, since what is there already makes no new commit."""
    wanted = f"HUB_MODEL_ID={settings.hub_model_id}"
    if settings.hub_merged_model_id:
        wanted += f" HUB_MERGED_MODEL_ID={settings.hub_merged_model_id}"
    try:
        yield
    except (HubError, SettingsError, MachineError) as error:
        raise HubError(
            *error.problems,
            f"Everything is still in {output}. To publish it: python entrypoint.py push {wanted} "
            f"OUTPUT_DIR={output} (or make push-hub); no GPU is needed.",
        ) from None
