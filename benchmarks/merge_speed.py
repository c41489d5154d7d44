"""The merge, written, read back and compared, against a plain copy of the same files on the same disk; one after the other.

  python3 benchmarks/merge_speed.py OUT.json [BASE [WORKERS ...]]

Without BASE, five layers of an 8B Llama are made (4.3 GB, three files). Both write through to the disk in the folder of OUT.json.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from finetune import files  # noqa: E402
from finetune.run import provenance  # noqa: E402
from finetune.sources.model import Source  # noqa: E402
from finetune.weights import compare, sums  # noqa: E402
from finetune.weights import merge as export  # noqa: E402
from scripts import bench  # noqa: E402

ROUNDS = 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(folder: Path) -> Path:
    """Five layers of an 8B Llama with random weights."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=5, num_attention_heads=32,
        num_key_value_heads=8, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="2GB")
    torch.set_default_dtype(torch.float32)
    return folder


def adapter(source: Path, output: Path) -> None:
    """A random adapter of rank 16 for this base, at `output`/adapter. The base itself is not loaded."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(p.shape, generator=generator) * 0.02 for name, p in adapted.named_parameters() if p.requires_grad
    }  # fmt: skip
    state = {name.replace(".default", ""): weight for name, weight in weights.items()}
    adapted.save_pretrained(output / "adapter", state_dict=state, save_embedding_layers=False)


def main(out: Path, source: Path | None, workers: list[int]) -> None:
    """Alternate, and write what was found."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = dict(
        command=" ".join(["python3 benchmarks/merge_speed.py OUT.json", *sys.argv[2:]]), device=device
    )
    found |= (
        bench.machine()
        if device == "cuda"
        else dict(cpu=provenance.environment(None, {})["cpu"], versions=provenance.versions())
    )
    found |= dict(cores=len(os.sched_getaffinity(0)), copy_s=[], merge_s={str(count): [] for count in workers})
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        work = Path(place)
        source = source or base(work / "base")
        adapter(source, work)
        for _ in range(ROUNDS):
            for count in workers:
                for module in (sums, compare, export):
                    module.WORKERS = count
                done = export.merge(Source("base", None, source), work, device)
                found["merge_s"][str(count)].append(done.seconds)
                shutil.rmtree(work / "merged")
            size = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e9
            found["copy_s"].append(round(size / bench.copied(source, work), 2))
    found["gb"] = round(size, 2)
    found["times_the_copy"] = {
        count: round(statistics.median(seconds) / statistics.median(found["copy_s"]), 2)
        for count, seconds in found["merge_s"].items()
    }
    files.write_json(out, found)
    print({key: found[key] for key in ("gb", "copy_s", "merge_s", "times_the_copy")})


if __name__ == "__main__":
    given = sys.argv[2:]
    main(
        Path(sys.argv[1]),
        Path(given[0]) if given else None,
        [int(word) for word in given[1:]] or [sums.WORKERS],
    )
