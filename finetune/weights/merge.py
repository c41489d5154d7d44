"""The adapter as PEFT writes it, and the streamed 16-bit merge: base shards in, merged shards out, checked on disk.

The merge adds scale * B @ A in float64 and rounds once to the tensor's own type, so that CPU and GPU, and any number of
threads, give the same bytes. It goes block by block, several at once: while some are made and written, those before them
go to the disk, and those that have arrived there are read back and compared.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import functools
import json
import math
import os
import shutil
import struct
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from finetune import files
from finetune.errors import MachineError, MergeError, SettingsError
from finetune.machine.preflight import data_bytes, safetensors_header
from finetune.sources.hub import INDEX, PROCESSOR_FILES, TOKENIZER_FILES, Source, weight_files
from finetune.weights.shards import CODES, Adapter, Base, Shard

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor

# Blocks between two waits for the disk: 0.5 GB, so that it has work from the start and little is left to check at the end.
GROUP = 256
WORKERS = min(4, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What the merged tensors are. changed: targets whose weights moved; rounded_away: targets that 16 bits left as the base's.

    unreached: targets for which nothing was learned, such as layers without a gradient; unreached_first: one of them.
    kept: tensors without a target, equal to the base's bit for bit; rounded: to the base's, rounded to bfloat16.
    """

    changed: int
    rounded_away: int
    unreached: int
    unreached_first: str | None
    kept: int
    rounded: int


@dataclasses.dataclass(frozen=True)
class Merged(Counts):
    """What was verified. gb: of the shards; seconds: to write, read back and compare them."""

    gb: float
    seconds: float

    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def save_adapter(
    model: PeftModel, source: Source, output: Path, words: Mapping[str, bytes] = MappingProxyType({})
) -> None:
    """Write `output`/adapter: weights and configuration as PEFT wrote them, and the base's own tokenizer files.

    words: files to write in place of the base's own, where these would mislead (data.rewritten).
    """
    partial = output / "adapter.partial"
    files.remove(partial)
    model.save_pretrained(partial, save_embedding_layers=False)
    files.open_as_its_neighbours(partial)
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is written at the end
    config = json.loads((partial / "adapter_config.json").read_bytes())
    # of a folder only its own name: the adapter's bytes must not depend on where the base stood
    name = source.name if source.commit else Path(source.name).absolute().name
    config.update(base_model_name_or_path=name, revision=source.commit, inference_mode=True)
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])  # a set in PEFT: another order each time
    files.write_json(partial / "adapter_config.json", config)
    _copy(source.folder, partial, TOKENIZER_FILES, words)
    files.publish(partial, output / "adapter")


def merge(
    source: Source, output: Path, device: str = "cpu", words: Mapping[str, bytes] = MappingProxyType({})
) -> Merged:
    """Write `output`/merged from the 16-bit base and `output`/adapter, verify it, and only then give it its name.

    device: where the sums are made; the bytes are the same on each. words: as for `save_adapter`.

    Raises MergeError where a tensor is not what it must be, MachineError where the disk is full.
    """
    began = time.perf_counter()
    base = Base(source.folder)
    sums = Sums(base, Adapter(output / "adapter"), device)
    partial = output / "merged.partial"
    files.remove(partial)
    partial.mkdir(parents=True)
    try:
        paths = [partial / name for name in _shard_names(len(base.shards))]
        _write_and_check(sums, base.shards, paths)
        size = sum(path.stat().st_size for path in paths)
        if len(paths) > 1:
            files.write_json(partial / INDEX, _index(paths))
        _write_configs(source, base, sums.dtypes, partial, words)
    except BaseException as error:  # whatever ends it: no half a model stays on the disk
        files.remove(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise MachineError(
                f"{output}: the disk is full, the merge needs {base.size / 1e9:.1f} GB. The adapter and the checkpoint are "
                "kept: free some space and start again with the same settings, or set SAVE_MERGED=0."
            ) from None
        raise
    files.publish(partial, output / "merged")
    seconds = round(time.perf_counter() - began, 2)
    return Merged(**dataclasses.asdict(sums.counts()), gb=round(size / 1e9, 3), seconds=seconds)


@dataclasses.dataclass(frozen=True)
class Block:
    """`BLOCK` weights of a tensor, in the base's shard and in the one that is made of it. row: the first."""

    shard: Shard
    made: Shard
    name: str
    row: int


class Sums:
    """base + adapter, block by block. device: where the sums are made. dtypes: of the tensors that are made, by the `old` rule or not."""

    def __init__(self, base: Base, adapter: Adapter, device: str, old: bool = False):
        self.targets, self.scale, self.device = adapter.locate(base), adapter.scale, device
        self.dtypes, self.changed = _merged_dtypes(base, old), set[str]()
        self.kept = [name for name in base.shapes if name not in self.targets]
        self.rounded = [name for name in self.kept if self.dtypes[name] != base.dtypes[name]]
        # B begins with zeros: it still holds nothing else where no gradient came
        pairs = ((name, target) for name, target in self.targets.items() if isinstance(target, tuple))
        self.unreached = {name for name, pair in pairs if not all(bool(factor.any()) for factor in pair)}
        # of the tensors under way: in float64 the whole adapter takes 0.3 GB of an 8B model's card at rank 16, 5 GB at 256
        self.factors = functools.lru_cache(2 * WORKERS)(lambda name: [f.to(device) for f in self.targets[name]])

    def merged(self, block: Block) -> tuple[Tensor, Tensor]:
        """The block of the base in the type of the merge, and what it becomes: the sum, the trained bias, or itself."""
        import torch

        weight, target = block.shard.read(block.name, block.row), self.targets.get(block.name)
        before = weight.to(self.dtypes[block.name])
        if not isinstance(target, tuple):
            return before, before if target is None else target.to(before.dtype)[None]
        left, right = self.factors(block.name)
        exact = weight.to(self.device).to(torch.float64, copy=True)
        exact.addmm_(left[block.row : block.row + len(weight)], right, alpha=self.scale)
        return before, exact.to(before.dtype)

    def counts(self) -> Counts:
        """Of what was checked."""
        changed, unreached = len(self.changed), sorted(self.unreached - self.changed)
        return Counts(
            changed=changed,
            rounded_away=len(self.targets) - changed - len(unreached),
            unreached=len(unreached),
            unreached_first=unreached[0] if unreached else None,
            kept=len(self.kept) - len(self.rounded),
            rounded=len(self.rounded),
        )

    def write(self, block: Block) -> None:
        """Write the block to its place in a file that has its header."""
        import torch

        content = memoryview(self.merged(block)[1].cpu().view(torch.uint8).numpy()).cast("B")
        with open(block.made.path, "r+b", buffering=0) as stream:
            stream.seek(block.made.offset(block.name, block.row))
            while content:
                content = content[stream.write(content) :]

    def check(self, block: Block) -> None:
        """Read the block back. Raises MergeError where it is not base + adapter, bit for bit, or not finite."""
        import torch

        before, merged = self.merged(block)
        found, at = block.made.read(block.name, block.row), f"{block.made.path.name}: {block.name}"
        if not _finite(found):
            raise MergeError(f"{at} holds values that are not finite")
        if not torch.equal(found.to(merged.device).view(torch.uint8), merged.view(torch.uint8)):
            wrong = "is not base + adapter" if block.name in self.targets else "has no adapter, but is not the base's"
            raise MergeError(f"{at} {wrong}")
        if block.name in self.targets and not torch.equal(found, before):
            self.changed.add(block.name)
        elif isinstance(target := self.targets.get(block.name), torch.Tensor):
            weight = block.shard.read(block.name, block.row)
            if torch.equal(target.to(torch.float64)[None], weight.to(torch.float64)):  # a bias as it was
                self.unreached.add(block.name)


def _finite(tensor: Tensor) -> bool:
    """No value is infinite or not a number; the smallest and the largest are not a number where one is not."""
    return not tensor.is_floating_point() or all(map(math.isfinite, tensor.aminmax()))


def _merged_dtypes(base: Base, old: bool) -> dict[str, torch.dtype]:
    """The type of each merged tensor: the base's own. A base that is float32 or float64 as a whole becomes a 16-bit one.

    Its matrices then become bfloat16, which has their range. What has fewer dimensions stays (norms, biases, A_log): it is
    small, and the model may need its last bits. old: as programs before this rule did it, who rounded all that is wide.
    """
    import torch

    wide = (torch.float32, torch.float64)
    if not old and _most(base, base.dtypes) not in wide:
        return dict(base.dtypes)
    narrowed = {name for name, dtype in base.dtypes.items() if dtype in wide and (old or len(base.shapes[name]) > 1)}
    return {name: torch.bfloat16 if name in narrowed else dtype for name, dtype in base.dtypes.items()}


def _most(base: Base, dtypes: Mapping[str, torch.dtype]) -> torch.dtype | None:
    """The type that most of the base's weights have in `dtypes`; None: it has none."""
    counts: collections.Counter[torch.dtype] = collections.Counter()
    for name, dtype in dtypes.items():
        if dtype.is_floating_point:
            counts[dtype] += math.prod(base.shapes[name])
    return counts.most_common(1)[0][0] if counts else None


def _blocks(shard: Shard, made: Shard) -> list[Block]:
    return [Block(shard, made, name, row) for name in shard.names for row in shard.starts(name)]


def _write_and_check(sums: Sums, shards: list[Shard], paths: list[Path]) -> None:
    """Write the shards; while a group of blocks is made, the one before it goes to the disk, and is then read back.

    Raises MergeError where it is not what was written.
    """
    made = [_begin(shard, path, sums.dtypes) for shard, path in zip(shards, paths, strict=True)]
    blocks = [block for pair in zip(shards, made, strict=True) for block in _blocks(*pair)]
    before: list[Block] = []
    checks: list[Iterable[None]] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        for start in range(0, len(blocks) + GROUP, GROUP):
            group = blocks[start : start + GROUP]
            writing = pool.map(sums.write, group)
            for block in {block.made: block for block in before}.values():
                with open(block.made.path, "rb") as stream:
                    os.fdatasync(stream.fileno())
                _made_of(block.shard, block.made.path, sums.dtypes)
            checks.append(pool.map(sums.check, before))
            list(writing)  # waits, and raises what a worker raised
            before = group
        for done in checks:
            list(done)


def compare(source: Source, output: Path, old: bool = False) -> Counts:
    """Hold `output`/merged against base and `output`/adapter, block by block. old: its types are those of `_merged_dtypes`' old rule.

    Raises SettingsError that names, for each shard, the first tensor that is not what it must be.
    """
    base, folder, problems = Base(source.folder), output / "merged", []
    sums = Sums(base, Adapter(output / "adapter"), "cpu", old)
    paths = [folder / name for name in _shard_names(len(base.shards))]
    if weight_files(folder) != [path.name for path in paths]:
        raise SettingsError(f"{folder}: has {', '.join(weight_files(folder))}; a merge of this base has {', '.join(path.name for path in paths)}")  # fmt: skip
    if len(paths) > 1 and json.loads((folder / INDEX).read_bytes()) != _index(paths):
        problems.append(f"{folder / INDEX}: does not say what is in the shards")
    for shard, path in zip(base.shards, paths, strict=True):
        try:
            with ThreadPoolExecutor(WORKERS) as pool:
                list(pool.map(sums.check, _blocks(shard, _made_of(shard, path, sums.dtypes))))
        except MergeError as error:
            problems += [f"{folder}: {problem}" for problem in error.problems]
    if problems:
        raise SettingsError(*problems, f"{folder}: is not base + adapter; train again, or take a copy that is")
    return sums.counts()


def structure(output: Path) -> str:
    """What can be told of adapter and merged weights without their base, in words. One block at a time.

    Raises SettingsError that names each tensor that is not finite, lacks its place, or is not where the index says.
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
        if len(merged.shards) > 1 and json.loads((output / "merged" / INDEX).read_bytes()) != _index([shard.path for shard in merged.shards]):  # fmt: skip
            problems.append(f"{output / 'merged' / INDEX}: does not say what is in the shards")
        for shard in merged.shards:
            for name in shard.names:
                if not all(_finite(shard.read(name, row)) for row in shard.starts(name)):
                    problems.append(f"{shard.path}: {name} holds values that are not finite")
    if adapter and merged:
        said.append(f"each of the adapter's {len(adapter.locate(merged))} targets is there in its shape")
    if problems:
        raise SettingsError(*problems)
    return ", ".join(said)


def _made_of(shard: Shard, path: Path, dtypes: Mapping[str, torch.dtype]) -> Shard:
    """The file at `path`. Raises MergeError where it does not hold the base's tensors in their order and the merge's types."""
    made, wanted = Shard(path), _header(shard, dtypes)
    if wrong := sorted(name for name in {*made.header, *wanted} if made.header.get(name) != wanted.get(name)):
        raise MergeError(f"{path.name}: holds other tensors than the base's {shard.path.name}: {', '.join(wrong)}")
    return made


def _header(shard: Shard, dtypes: Mapping[str, torch.dtype]) -> dict[str, dict[str, Any]]:
    """The safetensors header of what is made of the shard: its tensors, in its order, one after the other."""
    codes = {f"torch.{name}": code for code, name in CODES.items()}
    header, offset = {}, 0
    for name in shard.names:
        dtype, shape = dtypes[name], shard.shapes[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = dict(dtype=codes[str(dtype)], shape=list(shape), data_offsets=[offset, end])
        offset = end
    return header


def _begin(shard: Shard, path: Path, dtypes: Mapping[str, torch.dtype]) -> Shard:
    """The file for what is made of the shard: length of the header (8 bytes), header in JSON, and as yet no data."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **_header(shard, dtypes)}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return Shard(path)


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _index(paths: list[Path]) -> dict[str, Any]:
    """The content of the index over these safetensors files."""
    headers = {path.name: safetensors_header(path) for path in paths}
    weights = {name: file for file, header in headers.items() for name in header}
    total = sum(data_bytes(header) for header in headers.values())
    return dict(metadata=dict(total_size=total), weight_map=dict(sorted(weights.items())))


def _write_configs(
    source: Source, base: Base, dtypes: Mapping[str, torch.dtype], folder: Path, words: Mapping[str, bytes]
) -> None:
    """config.json with the type of the weights, generation_config.json, tokenizer and processor, all the base's own.

    The type is that of most merged weights. What the base's config.json says may be another one, in which they would be loaded
    and rounded.
    """
    config = json.loads((source.folder / "config.json").read_bytes())
    config.pop("torch_dtype", None)
    config["dtype"] = str(_most(base, dtypes)).removeprefix("torch.")
    files.write_json(folder / "config.json", config)
    _copy(source.folder, folder, (*TOKENIZER_FILES, *PROCESSOR_FILES, "generation_config.json"), words)
    if not (folder / "generation_config.json").exists():
        from transformers import AutoConfig, GenerationConfig

        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def _copy(source: Path, target: Path, names: tuple[str, ...], instead: Mapping[str, bytes]) -> None:
    """Copy the files that are there. instead: the content of some, in place of the source's."""
    for name in names:
        if name in instead:
            files.write_bytes(target / name, instead[name])
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)
