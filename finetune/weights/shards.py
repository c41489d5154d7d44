"""Weights on disk: the 16-bit base, read block by block, and an adapter as PEFT wrote it; and which belongs to which."""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import MergeError, SettingsError
from finetune.machine.preflight import safetensors_header
from finetune.sources.hub import Source, weight_files

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

# Weights that are added at once, the same on every device: BLAS may add in another order where a matrix has another shape.
# Another order changes the last bit of most float64 sums, and 3e-14 of them then round to another bfloat16. Malloc keeps
# the 8 MB of float64 for the next block; 32 MB it would take from the system each time, and a sum takes 5 times as long.
BLOCK = 2**20
CODES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip


class Shard:
    """One file of weights, read block by block; read, not mapped, so that memory stays that of a block."""

    def __init__(self, path: Path):
        import torch

        self.path = path
        if path.suffix == ".safetensors":
            self.header = safetensors_header(path)
            with open(path, "rb") as stream:
                self.data = 8 + int.from_bytes(stream.read(8), "little")
            self.names = sorted(self.header, key=lambda name: self.header[name]["data_offsets"][0])
            self.shapes = {name: tuple(self.header[name]["shape"]) for name in self.names}
            if unknown := {entry["dtype"] for entry in self.header.values()} - set(CODES):
                raise SettingsError(
                    f"{path}: holds {', '.join(sorted(unknown))}, and the merge needs a 16-bit base; name the 16-bit "
                    "original in MODEL_NAME, or set SAVE_MERGED=0"
                )
            self.dtypes = {name: getattr(torch, CODES[self.header[name]["dtype"]]) for name in self.names}
        else:
            # before 1.6 torch.save wrote no zip archive, and nothing else can be mapped
            mapped = zipfile.is_zipfile(path)
            self.loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
            self.names = sorted(name for name, value in self.loaded.items() if isinstance(value, torch.Tensor))
            self.shapes = {name: tuple(self.loaded[name].shape) for name in self.names}
            self.dtypes = {name: self.loaded[name].dtype for name in self.names}

    def starts(self, name: str) -> range:
        """The rows at which the tensor's blocks begin. A row is all of the last dimension."""
        *above, width = self.shapes[name] or (1,)
        return range(0, math.prod(above) if width else 0, max(1, BLOCK // max(1, width)))

    def read(self, name: str, row: int) -> Tensor:
        """The block that begins at that row, as a matrix (rows, width). Raises SettingsError where the file ends within it."""
        import torch

        starts, width = self.starts(name), (self.shapes[name] or (1,))[-1]
        count = min(starts.step, starts.stop - row)
        if self.path.suffix != ".safetensors":
            return torch.atleast_2d(self.loaded[name]).flatten(0, -2)[row : row + count].contiguous()
        block = torch.empty(count, width, dtype=self.dtypes[name])
        with open(self.path, "rb") as stream:  # buffered: a read that comes in parts, as over a network, is made whole
            stream.seek(self.offset(name, row))
            if stream.readinto(block.view(torch.uint8).numpy()) != block.nbytes:
                raise SettingsError(f"{self.path}: ends within {name}; download or copy the model again")
        return block

    def offset(self, name: str, row: int) -> int:
        """Where in the safetensors file the row's bytes begin."""
        start, end = self.header[name]["data_offsets"]
        return self.data + start + row * (end - start) // self.starts(name).stop


class Base:
    """The 16-bit base on disk. Raises SettingsError where it is quantised, or has no weights that can be read."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "config.json").read_bytes())
        if "quantization_config" in config:
            raise SettingsError(
                f"MODEL_NAME={folder}: is a quantised model ({config['quantization_config'].get('quant_method')}), to which a "
                "16-bit merge cannot add; name its 16-bit original, or set SAVE_MERGED=0"
            )
        self.shards = [Shard(folder / name) for name in weight_files(folder)]
        self.folder = folder
        self.shapes = {name: shape for shard in self.shards for name, shape in shard.shapes.items()}
        self.dtypes = {name: dtype for shard in self.shards for name, dtype in shard.dtypes.items()}
        self.size = sum(shard.path.stat().st_size for shard in self.shards)


class Adapter:
    """An adapter folder as PEFT wrote it. pairs: module name -> (A, B), float64, (r, in) and (out, r); biases: name -> tensor.

    Raises MergeError where it holds something else.
    """

    def __init__(self, folder: Path):
        import torch
        from safetensors.torch import load_file

        config = json.loads((folder / "adapter_config.json").read_bytes())
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

    def locate(self, base: Base) -> dict[str, tuple[Tensor, Tensor] | Tensor]:
        """For tensors of the base, two factors whose product is added, or the bias that takes its place.

        Raises SettingsError where the base has none for a part of the adapter.
        """
        layout = Layout(base, {*self.pairs, *self.biases})
        found: dict[str, tuple[Tensor, Tensor] | Tensor] = {}
        for module, (a, b) in self.pairs.items():
            left, right = (a.T, b.T) if module in layout.transposed else (b, a)
            found[layout.tensor(module, "weight", (left.shape[0], right.shape[1]))] = left, right
        for module, bias in self.biases.items():
            found[layout.tensor(module, "bias", tuple(bias.shape))] = bias
        return found


class Layout:
    """Which tensor of the base is which part of the model, as transformers finds it. transposed: modules that store (in, out).

    Names in the files are often other ones than in the model, and names alone mislead: below the same end stand layers of
    the language model, of towers for pictures and sound, and of those that predict further tokens (MTP), which are not loaded.
    """

    def __init__(self, base: Base, modules: Collection[str]):
        """modules: of the adapter. Of the classes that take the base it is the one in which most of them are found."""
        from transformers.pytorch_utils import Conv1D

        self.base, best, found = base, -1, dict[str, Any]()
        for model in _models(base.folder):
            inside = dict(model.named_modules())
            if (count := len(inside.keys() & set(modules))) > best:
                best, found = count, inside
            if count == len(modules):
                break
        if not found:
            raise SettingsError(
                f"MODEL_NAME={base.folder}: is of a kind that transformers cannot build, so that the merge cannot find its "
                "weights; set SAVE_MERGED=0"
            )
        self.transposed = {name for name, module in found.items() if isinstance(module, Conv1D)}
        self.names = _loaded_as(found[""], base.shapes)

    def tensor(self, module: str, part: str, shape: tuple[int, ...]) -> str:
        """The base's tensor for a module's weight or bias. Raises SettingsError where it has none of this shape."""
        name = self.names.get(f"{module}.{part}", "")
        if self.base.shapes.get(name) == shape:
            return name
        raise SettingsError(
            f"{self.base.folder.name}: the weights of {module} are stored in another form than the model uses, so that the merge "
            "cannot find them; leave it out of TARGET_MODULES, or set SAVE_MERGED=0"
        )


def _models(folder: Path) -> Iterator[Any]:
    """The model without its weights, in each class that takes it: the transformers engine's first, then those of unsloth."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        model = None
        with torch.device("meta"), contextlib.suppress(ValueError):  # of a kind that it does not know
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = kind.from_config(config, trust_remote_code=False)
        if model is not None:
            yield model


def _loaded_as(model: Any, names: Collection[str]) -> dict[str, str]:
    """Name in the model -> name of the tensor that transformers loads there as it is; "" where it makes it of several.

    As convert_and_load_state_dict_in_model goes through them: sorted, all renamings, then one conversion; the first counts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    prefix, inside = model.base_model_prefix, model.state_dict()
    found: dict[str, str] = {}
    for name in sorted(names, key=dot_natural_key):
        here, converted = rename_source_key(name, renamings, converters, prefix, inside)
        if here not in inside and name in inside:
            here, converted = rename_source_key(name, [], [], prefix, inside)
        if here in inside:
            found.setdefault(here, "" if converted else name)
    return found


def check_mergeable(model: PeftModel, source: Source) -> None:
    """Before training: every adapted module has its tensor in the base. Raises SettingsError that names those without."""
    from peft.tuners.lora.layer import ParamWrapper

    adapted = {key: module for key, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    layout = Layout(Base(source.folder), adapted)
    found, lost = set(), set()
    for key, module in adapted.items():
        shape = (module.out_features, module.in_features)
        name = key.removesuffix(".base_layer").rpartition(".")[2]
        try:
            layout.tensor(key, "weight", shape[::-1] if key in layout.transposed else shape)
            if not isinstance(module, ParamWrapper):  # which no name in TARGET_MODULES makes
                found.add(name)
        except SettingsError:
            lost.add(name)
    if lost:
        rest = ",".join(sorted(found - lost))
        raise SettingsError(
            f"TARGET_MODULES: {source.name} stores the weights of {', '.join(sorted(lost))} in another form than the model uses, so that "
            f"the merge cannot find them; leave them out{rest and f', for example TARGET_MODULES={rest}'}, or set SAVE_MERGED=0"
        )
