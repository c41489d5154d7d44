"""The streamed 16-bit merge: base shards in, merged shards out, checked on disk.

It goes block by block, several at once: while some are made and written, those before them go to the disk, and those
that have arrived there are read back and compared. All of it can go on while the model still answers: `meanwhile`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from finetune import console, files
from finetune.errors import MachineError
from finetune.sources.model import INDEX, PROCESSOR_FILES, TOKENIZER_FILES, Source
from finetune.weights.adapter import NONE, Adapter
from finetune.weights.shards import Base, Shard, begin, index, made_of, shard_names
from finetune.weights.sums import WORKERS, Block, Counts, Sums, blocks, most

# Blocks between two waits for the disk: 0.5 GB, so that it has work from the start and little is left to check at the
# end.
GROUP = 256


@dataclasses.dataclass(frozen=True)
class Merged(Counts):
    """What was verified. gb: of the shards; seconds: to write, read back and compare them. sha256: of each shard, under its name below OUTPUT_DIR."""

    gb: float
    seconds: float
    sha256: dict[str, str]

    def record(self) -> dict[str, Any]:
        """What run.json says of the merge. The hashes stand among those of all files there."""
        found = dataclasses.asdict(self)
        del found["sha256"]
        return found


@contextlib.contextmanager
def meanwhile(
    source: Source, output: Path, device: str, words: Mapping[str, bytes], wanted: bool
) -> Iterator[Future[Merged | None]]:  # fmt: skip
    """`merge` in a thread, while the caller does something else. Where that fails, the merge ends and its part is removed.

    Yields what comes of it: None if it is not `wanted`.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        merging = pool.submit(lambda: merge(source, output, device, words, stop) if wanted else None)
        try:
            yield merging
            if wanted:
                with console.stage("saving", "merging base and adapter"):
                    wait([merging])
        except BaseException:
            stop.set()
            raise


def merge(
    source: Source, output: Path, device: str = "cpu", words: Mapping[str, bytes] = NONE, stop: threading.Event | None = None
) -> Merged:  # fmt: skip
    """Write `output`/merged from the 16-bit base and `output`/adapter, verify it, and only then give it its name.

    device: where the sums are made; the bytes are the same on each. words: as for `adapter.save`. stop: ends it where it is set.

    Raises MergeError where a tensor is not what it must be, MachineError where the disk is full, CancelledError after `stop`.
    """
    began = time.perf_counter()
    base = Base(source.folder)
    sums = Sums(base, Adapter(output / "adapter"), device)
    partial = output / "merged.partial"
    files.remove(partial)
    partial.mkdir(parents=True)
    try:
        paths = [partial / name for name in shard_names(len(base.shards))]
        digests = _write_and_check(sums, base.shards, paths, stop or threading.Event())
        size = sum(path.stat().st_size for path in paths)
        if len(paths) > 1:
            files.write_json(partial / INDEX, index(paths))
        _write_configs(source, base, sums.dtypes, partial, words)
    except BaseException as error:  # whatever the error: no part of a model stays on the disk
        files.remove(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise MachineError(
                f"{output}: the disk is full, the merge needs {base.size / 1e9:.1f} GB. The adapter and the checkpoint "
                "are kept: free some space and start again with the same settings, or set SAVE_MERGED=0."
            ) from None
        raise
    files.publish(partial, output / "merged")
    seconds = round(time.perf_counter() - began, 2)
    return Merged(
        **dataclasses.asdict(sums.counts()),
        gb=round(size / 1e9, 3),
        seconds=seconds,
        sha256={f"merged/{name}": digest for name, digest in digests.items()},
    )


def _write_and_check(sums: Sums, shards: list[Shard], paths: list[Path], stop: threading.Event) -> dict[str, str]:
    """Write the shards; while a group of blocks is made, the one before it goes to the disk, and is then read back.

    Returns the sha256 of each shard. Raises MergeError where it is not what was written.
    """
    made = [begin(shard, path, sums.dtypes) for shard, path in zip(shards, paths, strict=True)]
    work = [block for pair in zip(shards, made, strict=True) for block in blocks(*pair)]
    last = {block.made.path.name: block for block in work}
    before: list[Block] = []
    checks: list[Iterable[None]] = []
    digests: dict[str, Future[str]] = {}
    with ThreadPoolExecutor(WORKERS, initializer=sums.begin_thread) as pool:
        for start in range(0, len(work) + GROUP, GROUP):
            if stop.is_set():
                raise CancelledError
            group = work[start : start + GROUP]
            writing = pool.map(sums.write, group)
            for block in {block.made: block for block in before}.values():
                with open(block.made.path, "rb") as stream:
                    os.fdatasync(stream.fileno())
                made_of(block.shard, block.made.path, sums.dtypes, whole=False)
            checks.append(pool.map(sums.check, before))
            for block in before:
                if block is last[block.made.path.name]:  # the file is whole, and its bytes are still in memory
                    digests[block.made.path.name] = pool.submit(files.sha256, block.made.path)
            list(writing)  # waits, and raises what a worker raised
            before = group
        for done in checks:
            list(done)
        empty = {path.name: files.sha256(path) for path in paths if path.name not in digests}  # no tensor is in it
        return empty | {name: digest.result() for name, digest in digests.items()}


def _write_configs(
    source: Source, base: Base, dtypes: Mapping[str, torch.dtype], folder: Path, words: Mapping[str, bytes]
) -> None:
    """config.json with the type of the weights, generation_config.json, tokenizer and processor, all the base's own.

    The type is that of most merged weights. The base's config.json may name another one, and loading would round the
    weights to it.
    """
    config = json.loads((source.folder / "config.json").read_bytes())
    config.pop("torch_dtype", None)
    config["dtype"] = str(most(base, dtypes)).removeprefix("torch.")
    files.write_json(folder / "config.json", config)
    files.copy(source.folder, folder, (*TOKENIZER_FILES, *PROCESSOR_FILES, "generation_config.json"), words)
    if not (folder / "generation_config.json").exists():
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
