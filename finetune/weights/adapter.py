"""The adapter as PEFT writes it: saved, and read again with the base's tensors that it changes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from finetune import files
from finetune.errors import MergeError
from finetune.sources.model import TOKENIZER_FILES, Source, read_object
from finetune.weights import safetensors
from finetune.weights.layout import Layout
from finetune.weights.shards import Base

NONE: Mapping[str, bytes] = MappingProxyType({})
# what would make another sum of the same factors; a run of this program leaves each empty
PLAIN = (
    *("rank_pattern", "alpha_pattern", "use_dora", "use_qalora", "modules_to_save"),
    *("layer_replication", "target_parameters", "trainable_token_indices", "lora_bias", "megatron_config"),
)


def save(model: PeftModel, source: Source, output: Path, words: Mapping[str, bytes] = NONE) -> None:
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
    files.copy(source.folder, partial, TOKENIZER_FILES, words)
    files.publish(partial, output / "adapter")


def _partner(key: str) -> str:
    """The name of the other factor."""
    return key.replace(".lora_A.", ".lora_B.") if ".lora_A." in key else key.replace(".lora_B.", ".lora_A.")


class Adapter:
    """An adapter folder as PEFT wrote it.

    pairs: module name -> (A, B) in float64, of shapes (r, in) and (out, r). biases: module name -> tensor.

    Raises MergeError where it holds something else.
    """

    def __init__(self, folder: Path):
        config = read_object(folder / "adapter_config.json")
        rank, alpha = config.get("r", 0), config.get("lora_alpha", "")
        numbers = type(rank) is int and rank > 0 and type(alpha) in (int, float) and math.isfinite(alpha)
        odd = [name for name in PLAIN if config.get(name)]
        if not numbers or odd or config.get("peft_type") != "LORA":
            wrong = ", ".join(odd) or "r, lora_alpha or peft_type"
            raise MergeError(f"{folder / 'adapter_config.json'}: is not that of a plain LoRA adapter ({wrong})")
        self.scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self.biases: dict[str, Tensor] = {}
        safetensors.header(folder / "adapter_model.safetensors")
        tensors = load_file(folder / "adapter_model.safetensors")
        for key, value in tensors.items():
            name, other = key.removeprefix("base_model.model."), tensors.get(_partner(key))
            if name.endswith(".lora_A.weight") and other is not None:
                if value.shape[:1] != other.shape[1:] or (value.ndim, other.ndim, len(value)) != (2, 2, rank):
                    raise MergeError(f"{folder}: {key} and its lora_B.weight are not two factors of rank {rank}")
                self.pairs[name.removesuffix(".lora_A.weight")] = (value.to(torch.float64), other.to(torch.float64))
            elif name.endswith(".bias"):
                self.biases[name.removesuffix(".bias").removesuffix(".base_layer")] = value
            elif not name.endswith(".lora_B.weight") or other is None:
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
