"""Whether the disks hold what a run writes and downloads, and whether OUTPUT_DIR can be written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from finetune import files
from finetune.machine import container
from finetune.settings import Settings


def unwritable(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    """The sentence for an OUTPUT_DIR that cannot be written."""
    folder = Path(settings.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield (
            f"OUTPUT_DIR={folder}: cannot be written ({error.strerror}). Give a folder that user {os.getuid()} may "
            f"write{'' if container.image() else ', for example OUTPUT_DIR=~/outputs'}; {container.owner(environ, folder)}."
        )


def too_small(settings: Settings, environ: Mapping[str, str], count: int | None) -> Iterator[str]:
    """Sentences where the disk cannot hold what will be written: 16-bit weights are 2 bytes a parameter."""
    if count is None:
        return
    need: dict[int, tuple[Path, int]] = {}

    def add(folder: Path, size: int) -> None:
        existing = files.existing(folder)
        device = existing.stat().st_dev
        place, before = need.get(device, (existing, 0))
        need[device] = (place, before + size)

    if settings.save_merged:
        add(Path(settings.output_dir), 2 * count + 2**29)
    if not Path(settings.model_name).expanduser().is_dir():
        cache = _model_cache(settings.model_name, environ)
        if not any(file.suffix in (".safetensors", ".bin") for file in cache.glob("snapshots/*/*")):
            add(cache, 2 * count)
    for place, size in need.values():
        free = shutil.disk_usage(place).free
        if free < size:
            yield (
                f"{place}: {free / 1e9:.1f} GB free, about {size / 1e9:.1f} GB needed for the model's 16-bit weights. "
                f"Free some, or point OUTPUT_DIR or HF_HOME to a larger disk{'; SAVE_MERGED=0 needs less' if settings.save_merged else ''}."
            )


def _model_cache(name: str, environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps a model."""
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    return Path(environ.get("HF_HUB_CACHE") or Path(home) / "hub") / f"models--{name.replace('/', '--')}"
