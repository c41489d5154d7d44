"""Compares what a run left with what it must be: merged with base + adapter, or each by itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune.errors import MergeError, SettingsError
from finetune.sources.model import INDEX, Source, read_object, weight_files
from finetune.weights.adapter import Adapter
from finetune.weights.shards import Base, index, made_of, shard_names
from finetune.weights.sums import WORKERS, Counts, Sums, blocks, finite


def compare(source: Source, output: Path) -> Counts:
    """Compare `output`/merged with base and `output`/adapter, block by block.

    Raises SettingsError that names, for each shard, the first tensor that is not what it must be.
    """
    base, folder, problems = Base(source.folder), output / "merged", list[str]()
    sums = Sums(base, Adapter(output / "adapter"), "cpu")
    paths = [folder / name for name in shard_names(len(base.shards))]
    if weight_files(folder) != [path.name for path in paths]:
        names = ", ".join(path.name for path in paths)
        raise SettingsError(f"{folder}: has {', '.join(weight_files(folder))}; a merge of this base has {names}")
    problems += _wrong_index(folder, paths)
    for shard, path in zip(base.shards, paths, strict=True):
        try:
            with ThreadPoolExecutor(WORKERS) as pool:
                list(pool.map(sums.check, blocks(shard, made_of(shard, path, sums.dtypes))))
        except MergeError as error:
            problems += [f"{folder}: {problem}" for problem in error.problems]
    if problems:
        raise SettingsError(*problems, f"{folder}: is not base + adapter; train again, or take a copy that is")
    return sums.counts()


def _wrong_index(folder: Path, paths: list[Path]) -> list[str]:
    """The sentence for an index that is not that of these shards. One shard needs none."""
    if len(paths) == 1 or read_object(folder / INDEX) == index(paths):
        return []
    return [f"{folder / INDEX}: the index does not match the tensors in the shards"]


def structure(output: Path) -> str:
    """What can be told of adapter and merged weights without their base, in words. One block at a time.

    Raises SettingsError that names each tensor that is not finite, is missing, or is not where the index says.
    """
    problems, said = [], []
    adapter = Adapter(output / "adapter") if (output / "adapter").is_dir() else None
    merged = Base(output / "merged") if (output / "merged").is_dir() else None
    if adapter:
        said.append(f"the adapter's {len(adapter.pairs)} pairs are finite")
        whole = [name for name, pair in adapter.pairs.items() if not all(bool(part.isfinite().all()) for part in pair)]
        problems += [f"{output / 'adapter'}: {name} holds values that are not finite" for name in whole]
    if merged:
        said.append(f"the {len(merged.shapes)} merged tensors are complete and finite")
        problems += _wrong_index(output / "merged", [shard.path for shard in merged.shards])
        for shard in merged.shards:
            for name in shard.names:
                if not all(finite(shard.read(name, row)) for row in shard.starts(name)):
                    problems.append(f"{shard.path}: {name} holds values that are not finite")
    if adapter and merged:
        said.append(f"each of the adapter's {len(adapter.locate(merged))} targets is there in its shape")
    if problems:
        raise SettingsError(*problems)
    return ", ".join(said)
