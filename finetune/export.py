"""The adapter as PEFT writes it, and the streamed 16-bit merge: base shards in, merged shards out, checked on disk.

The merge adds scale * B @ A in float64 and rounds once to the base's 16-bit type, so that CPU and GPU, and any number of
threads, give the same bytes. It holds one tensor at a time, not the model.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import files
from finetune.errors import PreflightError, Refusal, SettingsError
from finetune.hub import INDEX, TOKENIZER_FILES, Source, weight_files
from finetune.preflight import safetensors_header

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor


class MergeError(Refusal):
    """The written weights are not base + adapter. A bug, or a disk that lies: nothing is kept under the final name."""


@dataclasses.dataclass(frozen=True)
class Merged:
    """What was verified. changed: targets whose weights moved; kept: tensors equal to the base's."""

    changed: int
    rounded_away: int
    kept: int
    gb: float
    seconds: float

    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def save_adapter(model: PeftModel, source: Source, output: Path) -> None:
    """Write `output`/adapter: weights and configuration as PEFT wrote them, and the base's own tokenizer files."""
    partial = output / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, save_embedding_layers=False)
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is written at the end
    config = json.loads((partial / "adapter_config.json").read_text())
    # of a folder only its own name: the adapter's bytes must not depend on where the base stood
    name = source.name if source.commit else Path(source.name).absolute().name
    config.update(base_model_name_or_path=name, revision=source.commit, inference_mode=True)
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])  # a set in PEFT: another order each time
    files.write_json(partial / "adapter_config.json", config)
    _copy(source.folder, partial, TOKENIZER_FILES)
    files.publish(partial, output / "adapter")


def merge(source: Source, output: Path, device: str = "cpu") -> Merged:
    """Write `output`/merged from the 16-bit base and `output`/adapter, verify it, and only then give it its name.

    device: where the sums are made; the bytes are the same on each.

    Raises MergeError where a tensor is not what it must be, PreflightError where the disk is full.
    """
    began = time.perf_counter()
    base, adapter = Base(source.folder), Adapter(output / "adapter")
    targets = adapter.locate(base)
    partial = output / "merged.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        work = [
            (shard, partial / name) for shard, name in zip(base.shards, _shard_names(len(base.shards)), strict=True)
        ]
        # each worker holds one tensor and its float64 copy: at most 5 GB for the largest matrix of an 8B model
        with ThreadPoolExecutor(min(4, len(work), os.cpu_count() or 1)) as pool:
            counts = list(pool.map(lambda job: _merge_shard(job[0], job[1], adapter, targets, device), work))
        size = sum(path.stat().st_size for _, path in work)
        if len(work) > 1:
            files.write_json(partial / INDEX, _index([path for _, path in work]))
        _write_configs(source, base, partial)
    except BaseException as error:  # whatever ends it: no half a model stays on the disk
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise PreflightError(
                f"{output}: the disk is full, the merge needs {base.size / 1e9:.1f} GB. The adapter and the checkpoint are "
                "kept: free some space and start again with the same settings, or set SAVE_MERGED=0."
            ) from None
        raise
    files.publish(partial, output / "merged")
    changed, rounded, kept = (sum(column) for column in zip(*counts, strict=True))
    return Merged(changed, rounded, kept, round(size / 1e9, 3), round(time.perf_counter() - began, 2))


CODES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip


class Shard:
    """One weight file of the base, read tensor by tensor; read, not mapped, so that memory stays that of one tensor."""

    def __init__(self, path: Path):
        self.path = path
        if path.suffix == ".safetensors":
            self.header = safetensors_header(path)
            self.names = sorted(self.header, key=lambda name: self.header[name]["data_offsets"][0])
            self.shapes = {name: tuple(self.header[name]["shape"]) for name in self.names}
            if unknown := {entry["dtype"] for entry in self.header.values()} - set(CODES):
                raise SettingsError(
                    f"{path}: holds {', '.join(sorted(unknown))}, and the merge needs a 16-bit base; name the 16-bit "
                    "original in MODEL_NAME, or set SAVE_MERGED=0"
                )
        else:
            import torch

            self.loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            self.names = sorted(name for name, value in self.loaded.items() if isinstance(value, torch.Tensor))
            self.shapes = {name: tuple(self.loaded[name].shape) for name in self.names}

    def dtype(self, name: str) -> torch.dtype:
        """The type of one tensor."""
        import torch

        if self.path.suffix != ".safetensors":
            return self.loaded[name].dtype
        return getattr(torch, CODES[self.header[name]["dtype"]])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, in the order of the file."""
        import torch

        if self.path.suffix != ".safetensors":
            yield from ((name, self.loaded[name]) for name in self.names)
            return
        with open(self.path, "rb", buffering=0) as stream:
            data = 8 + int.from_bytes(stream.read(8), "little")
            for name in self.names:
                start, end = self.header[name]["data_offsets"]
                content = torch.empty(end - start, dtype=torch.uint8)
                stream.seek(data + start)
                if end > start and stream.readinto(content.numpy()) != end - start:
                    raise SettingsError(f"{self.path}: ends within {name}; download or copy the model again")
                yield name, content.view(self.dtype(name)).reshape(self.shapes[name])


class Base:
    """The 16-bit base on disk. Raises SettingsError where it is quantised, or has no weights that can be read."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "config.json").read_text())
        if "quantization_config" in config:
            raise SettingsError(
                f"MODEL_NAME={folder}: is a quantised model ({config['quantization_config'].get('quant_method')}), to which a "
                "16-bit merge cannot add; name its 16-bit original, or set SAVE_MERGED=0"
            )
        self.shards = [Shard(folder / name) for name in weight_files(folder)]
        self.folder = folder
        self.shapes = {name: shape for shard in self.shards for name, shape in shard.shapes.items()}
        self.size = sum(shard.path.stat().st_size for shard in self.shards)


class Adapter:
    """An adapter folder as PEFT wrote it. pairs: module name -> (A, B), float64; biases: module name -> tensor."""

    def __init__(self, folder: Path):
        import torch
        from safetensors.torch import load_file

        config = json.loads((folder / "adapter_config.json").read_text())
        rank, alpha = config["r"], config["lora_alpha"]
        self.scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self.biases: dict[str, Tensor] = {}
        tensors = load_file(folder / "adapter_model.safetensors")
        for key, value in tensors.items():
            name = key.removeprefix("base_model.model.")
            if name.endswith(".lora_A.weight"):
                other = tensors[key.replace(".lora_A.", ".lora_B.")]
                self.pairs[name.removesuffix(".lora_A.weight")] = (value.to(torch.float64), other.to(torch.float64))
            elif name.endswith(".bias"):
                self.biases[name.removesuffix(".bias").removesuffix(".base_layer")] = value
            elif not name.endswith(".lora_B.weight"):
                raise MergeError(f"{folder}: holds {key}, which the merge does not know")

    def locate(self, base: Base) -> dict[str, Target]:
        """Which tensor of the base each part of the adapter belongs to. Raises SettingsError where there is none."""
        conv = _transposed_modules(base.folder)
        found = {}
        for module, (a, b) in self.pairs.items():
            shape = (a.shape[1], b.shape[0]) if module in conv else (b.shape[0], a.shape[1])
            found[_tensor_of(module, "weight", base, shape)] = Target(module, "weight", module in conv)
        for module, bias in self.biases.items():
            found[_tensor_of(module, "bias", base, tuple(bias.shape))] = Target(module, "bias", False)
        return found

    def merged(self, target: Target | None, weight: Tensor, device: str) -> Tensor:
        """weight + scale * B @ A in float64, rounded once, on the CPU; a trained bias as it is; no target: the weight."""
        import torch

        dtype = _merged_dtype(weight.dtype)
        if target is None:
            return weight.to(dtype)
        weight = weight.to(device)
        if target.part == "bias":
            return self.biases[target.module].to(device).to(dtype).cpu()
        a, b = (factor.to(device) for factor in self.pairs[target.module])
        delta = b @ a
        merged = (delta.T if target.transposed else delta).mul_(self.scale).add_(weight.to(torch.float64))
        return merged.to(dtype).cpu()


@dataclasses.dataclass(frozen=True)
class Target:
    """A tensor of the base that the adapter changes. transposed: stored as (in, out), as in GPT-2."""

    module: str
    part: str
    transposed: bool


def _transposed_modules(folder: Path) -> set[str]:
    """Names of the modules that store their weight as (in, out)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}


def _tensor_of(module: str, part: str, base: Base, shape: tuple[int, ...]) -> str:
    """The base's tensor for a module: its own name, or the longest end of it that names just one tensor."""
    parts = module.split(".")
    for start in range(len(parts)):
        end = ".".join(parts[start:]) + f".{part}"
        found = [name for name in base.shapes if name == end or name.endswith(f".{end}")]
        if len(found) == 1 and base.shapes[found[0]] == shape:
            return found[0]
    raise SettingsError(
        f"{base.folder.name}: the weights of {module} are stored in another form than the model uses, so that the merge cannot "
        "find them; leave it out of TARGET_MODULES, or set SAVE_MERGED=0"
    )


def check_mergeable(model: PeftModel, source: Source) -> None:
    """Before training: every adapted module has its tensor in the base. Raises SettingsError where one has not."""
    base = Base(source.folder)
    conv = _transposed_modules(source.folder)
    for key, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            shape = (module.out_features, module.in_features)
            _tensor_of(key, "weight", base, shape[::-1] if key in conv else shape)


def _merged_dtype(dtype: torch.dtype) -> torch.dtype:
    """16-bit types stay; float32 and float64 become bfloat16, which has their range; whole numbers stay."""
    import torch

    return torch.bfloat16 if dtype in (torch.float32, torch.float64) else dtype


def _merge_shard(
    shard: Shard, path: Path, adapter: Adapter, targets: dict[str, Target], device: str
) -> tuple[int, int, int]:
    """Write one shard, then read it back and compare. Returns the counts of `_compare_shard`."""

    def merged(name: str, weight: Tensor) -> Tensor:
        return adapter.merged(targets.get(name), weight, device)

    _write_safetensors(path, shard, merged)
    return _compare_shard(shard, path, adapter, targets, device)


def compare(source: Source, output: Path) -> tuple[int, int, int]:
    """Hold `output`/merged against base and `output`/adapter, one tensor at a time: the counts of `_compare_shard`.

    Raises SettingsError that names, for each shard, the first tensor that is not what it must be.
    """
    base, adapter = Base(source.folder), Adapter(output / "adapter")
    targets, folder = adapter.locate(base), output / "merged"
    counts, problems = [], []
    paths = [folder / name for name in _shard_names(len(base.shards))]
    if weight_files(folder) != [path.name for path in paths]:
        raise SettingsError(f"{folder}: has {', '.join(weight_files(folder))}; a merge of this base has {', '.join(path.name for path in paths)}")  # fmt: skip
    if len(paths) > 1 and json.loads((folder / INDEX).read_text()) != _index(paths):
        problems.append(f"{folder / INDEX}: does not say what is in the shards")
    for shard, path in zip(base.shards, paths, strict=True):
        try:
            counts.append(_compare_shard(shard, path, adapter, targets, "cpu"))
        except MergeError as error:
            problems += [f"{folder}: {problem}" for problem in error.problems]
    if problems:
        raise SettingsError(*problems, f"{folder}: is not base + adapter; train again, or take a copy that is")
    changed, rounded, kept = (sum(column) for column in zip(*counts, strict=True))
    return changed, rounded, kept


def structure(output: Path) -> str:
    """What can be told of adapter and merged weights without their base, in words. One tensor at a time.

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
        if len(merged.shards) > 1 and json.loads((output / "merged" / INDEX).read_text()) != _index([shard.path for shard in merged.shards]):  # fmt: skip
            problems.append(f"{output / 'merged' / INDEX}: does not say what is in the shards")
        for shard in merged.shards:
            for name, tensor in shard.tensors():
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    problems.append(f"{shard.path}: {name} holds values that are not finite")
    if adapter and merged:
        said.append(f"each of the adapter's {len(adapter.locate(merged))} targets is there in its shape")
    if problems:
        raise SettingsError(*problems)
    return ", ".join(said)


def _compare_shard(
    shard: Shard, path: Path, adapter: Adapter, targets: dict[str, Target], device: str
) -> tuple[int, int, int]:
    """Counts (changed, rounded away, kept) for the shard written at `path`. Raises MergeError for a tensor that is wrong."""
    if (names := Shard(path).names) != shard.names:
        wrong = sorted({*names} ^ {*shard.names}) or ["their order"]
        raise MergeError(f"{path.name}: holds other tensors than the base's {shard.path.name}: {', '.join(wrong)}")
    changed = rounded = kept = 0
    for (name, weight), (written_name, written) in zip(shard.tensors(), Shard(path).tensors(), strict=True):
        before = weight.to(_merged_dtype(weight.dtype))
        if written_name != name or written.shape != weight.shape or written.dtype != before.dtype:
            raise MergeError(f"{path.name}: {written_name} stands where {name} must be, or in another form")
        if written.is_floating_point() and not bool(written.isfinite().all()):
            raise MergeError(f"{path.name}: {name} holds values that are not finite")
        same = bool((written == before).all())
        if name not in targets:
            if not same:
                raise MergeError(f"{path.name}: {name} has no adapter, but is not the base's")
            kept += 1
            continue
        if not bool((written == adapter.merged(targets[name], weight, device)).all()):
            raise MergeError(f"{path.name}: {name} is not base + adapter")
        changed, rounded = changed + (not same), rounded + same
    return changed, rounded, kept


def _write_safetensors(path: Path, shard: Shard, merged: Callable[[str, Tensor], Tensor]) -> None:
    """Write the shard's tensors one by one, in its order. Format: header length (8 bytes), JSON header, data."""
    import torch

    codes = {getattr(torch, name): code for code, name in CODES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in shard.names:
        dtype, shape = _merged_dtype(shard.dtype(name)), shard.shapes[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = dict(dtype=codes[dtype], shape=list(shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in shard.tensors():
            content = memoryview(merged(name, tensor).contiguous().reshape(-1).view(torch.uint8).numpy())
            while content:
                content = content[stream.write(content) or 0 :]
        os.fsync(stream.fileno())


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _index(paths: list[Path]) -> dict[str, Any]:
    """The content of the index over these safetensors files."""
    weights = {name: path.name for path in paths for name in safetensors_header(path)}
    total = sum(_data_bytes(path) for path in paths)
    return dict(metadata=dict(total_size=total), weight_map=dict(sorted(weights.items())))


def _data_bytes(path: Path) -> int:
    """Bytes of a safetensors file's tensors; they fill it from offset 0 without holes."""
    return max((entry["data_offsets"][1] for entry in safetensors_header(path).values()), default=0)


def _write_configs(source: Source, base: Base, folder: Path) -> None:
    """config.json with the type of the weights, generation_config.json and the tokenizer, all the base's own."""
    config = json.loads((source.folder / "config.json").read_text())
    kind = "float16" if config.get("dtype", config.get("torch_dtype")) == "float16" else "bfloat16"
    config.pop("torch_dtype", None)
    config["dtype"] = kind
    files.write_json(folder / "config.json", config)
    _copy(source.folder, folder, (*TOKENIZER_FILES, "generation_config.json"))
    if not (folder / "generation_config.json").exists():
        from transformers import AutoConfig, GenerationConfig

        GenerationConfig.from_model_config(AutoConfig.from_pretrained(source.folder)).save_pretrained(folder)


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
