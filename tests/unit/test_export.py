"""The merge on real models of several architectures, against PEFT's own mathematics; and what it refuses."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from finetune import export, files, weights
from finetune.errors import MergeError, PreflightError, SettingsError
from finetune.hub import Source

CASES: dict[str, dict[str, Any]] = {
    "llama": {}, "llama-sharded": {"shards": True}, "qwen2": {"tie_word_embeddings": True}, "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16}, "phi3": {"pad_token_id": 0}, "mistral": {}, "gpt2": {"tie_word_embeddings": True},
}  # fmt: skip


def adapted(folder: Path, output: Path, seed: int = 1, **options: Any) -> PeftModel:
    """A model with a random adapter of some size, saved as a run would save it."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or (p.requires_grad and name.endswith("bias")):
                p.normal_(std=0.05)
    weights.check_mergeable(model, Source("base", None, folder))
    export.save_adapter(model, Source("base", None, folder), output)
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_merged_equals_base_plus_adapter(tmp_path: Path, case: str) -> None:
    folder = tiny.model(tmp_path / "base", case.partition("-")[0], **CASES[case])
    model = adapted(folder, tmp_path)
    done = export.merge(Source("base", None, folder), tmp_path)
    base, merged = tensors(folder), tensors(tmp_path / "merged")
    assert base.keys() == merged.keys() and done.changed + done.kept == len(base) and done.rounded_away == 0
    assert (
        sum(not torch.equal(base[name], merged[name]) for name in base)
        == done.changed
        == len([name for name, _ in model.named_modules() if name.endswith("lora_A.default")])
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        wanted, found = model(ids).logits, again(ids).logits
    # each weight was rounded once to bfloat16 (8 bits, 0.4 %); over two layers that stays below 1 % of the logits' size
    assert (wanted - found).abs().max() < 0.01 * wanted.abs().max() + 0.01


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"target_modules": ["q_proj"]}]
)
def test_kinds_of_adapter(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tiny.model(tmp_path / "base", "qwen2")
    model = adapted(folder, tmp_path, **options)
    export.merge(Source("base", None, folder), tmp_path)
    reference = model.merge_and_unload().state_dict()
    for name, value in tensors(tmp_path / "merged").items():
        assert torch.equal(value, reference[name].to(torch.bfloat16)) or (value - reference[name]).abs().max() < 1e-3, (
            name
        )


def test_the_same_bytes_for_any_number_of_threads_and_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.model(tmp_path / "base", shards=True)
    adapted(folder, tmp_path)
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        monkeypatch.setattr(export, "WORKERS", count)
        torch.set_num_threads(count)
        export.merge(Source("base", None, folder), tmp_path)
        found.append(files.digests(tmp_path / "merged"))
    torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base" and str(tmp_path) not in json.dumps(config)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("block", [1, 300, 2**20])
def test_blocks_are_parts_of_the_float64_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, block: int
) -> None:
    folder = tiny.model(tmp_path / "base", kind)
    adapted(folder, tmp_path)
    monkeypatch.setattr(weights, "BLOCK", block)
    done = export.merge(Source("base", None, folder), tmp_path)
    adapter, merged = weights.Adapter(tmp_path / "adapter"), tensors(tmp_path / "merged")
    targets = adapter.locate(weights.Base(folder))
    assert done.changed == len(targets) > 0
    for name, weight in tensors(folder).items():
        wanted = weight
        if name in targets:
            # adds the ranks one by one, from the last: another order than BLAS has for any block
            ranks = zip(targets[name][0].T.flip(0), targets[name][1].flip(0), strict=True)
            wanted = (weight.double() + adapter.scale * sum(torch.outer(b, a) for b, a in ranks)).to(torch.bfloat16)
        assert torch.equal(merged[name], wanted), name


def test_experts_that_are_stored_one_by_one_are_refused_with_what_remains(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    with pytest.raises(SettingsError, match=r"weights of experts in .* for example TARGET_MODULES=k_proj,o_proj,q_proj,v_proj, or set SAVE_MERGED=0$"):  # fmt: skip
        adapted(folder, tmp_path)
    adapted(folder, tmp_path, target_modules=["k_proj", "q_proj"])
    assert export.merge(Source("base", None, folder), tmp_path).changed == 4


def test_layers_of_one_name_in_text_and_sight_are_told_apart_by_their_shape(tmp_path: Path) -> None:
    """Gemma 3: both have layers.0.self_attn.q_proj, under other names in files than in the model."""
    text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=1000)  # fmt: skip
    sight = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)  # fmt: skip
    folder = tiny.model(tmp_path / "base", "gemma3", text_config=text, vision_config=sight, mm_tokens_per_image=4)
    model = adapted(folder, tmp_path, target_modules=["q_proj", "o_proj", "down_proj"])
    assert export.merge(Source("base", None, folder), tmp_path).changed == 7
    wanted = model.merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert wanted.keys() == found.keys()
    assert all((wanted[name] - found[name]).abs().max() <= 0.01 * wanted[name].abs().max() for name in wanted)


def test_a_float32_base_becomes_bfloat16(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
    adapted(folder, tmp_path)
    export.merge(Source("base", None, folder), tmp_path)
    assert {value.dtype for value in tensors(tmp_path / "merged").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


@pytest.mark.parametrize("said", ["float32", "bfloat16", None])
def test_the_merged_config_says_the_type_that_the_weights_have(tmp_path: Path, said: str | None) -> None:
    """Of some models, BLOOM's among them, config.json says nothing or float32, and the weights are float16."""
    folder = tiny.model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": said} if said else {k: v for k, v in config.items() if k != "dtype"}))  # fmt: skip
    adapted(folder, tmp_path)
    export.merge(Source("base", None, folder), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, value in tensors(tmp_path / "merged").items():
        assert value.dtype == loaded[name].dtype == torch.float16 and torch.equal(value, loaded[name]), name


def test_a_pytorch_bin_base(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    adapted(folder, tmp_path)
    assert export.merge(Source("base", None, folder), tmp_path).changed == 14


def test_of_several_forms_the_one_that_is_trained_is_merged_into(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base", shards=True)
    save_file({n: v * 2 for n, v in tensors(folder).items()}, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("shards that an older save left", "an index without its shards"):
        model = adapted(folder, tmp_path)
        assert export.merge(Source("base", None, folder), tmp_path).changed == 14
        wanted = model.get_base_model().state_dict()["model.norm.weight"]
        assert torch.equal(tensors(tmp_path / "merged")["model.norm.weight"].float(), wanted), name
        for shard in folder.glob("model-*.safetensors"):
            shard.unlink()


def test_learning_too_small_for_16_bits_is_counted(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base")
    adapted(folder, tmp_path)
    values = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(
        {n: v * 0 if "lora_B" in n else v for n, v in values.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    assert export.merge(Source("base", None, folder), tmp_path).rounded_away == 14


def test_the_original_eos_and_generation_config_stay(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": true}')
    adapted(folder, tmp_path)
    export.merge(Source("base", None, folder), tmp_path)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["eos_token_id"] == json.loads((folder / "config.json").read_text())["eos_token_id"]


def test_not_finite_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base")
    adapted(folder, tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    values = load_file(path)
    next(v for n, v in values.items() if "lora_B" in n)[0, 0] = float("nan")
    save_file(values, path)
    with pytest.raises(MergeError, match="not finite"):
        export.merge(Source("base", None, folder), tmp_path)
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.partial").exists()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("model.norm.weight", "model.norm.weight has no adapter, but is not the base's"),
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight is not base"),
        ("", "holds other tensors than the base's"),
    ],
)
def test_a_disk_that_lies_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str) -> None:
    """A bit changes between writing and reading back: in a tensor's last value, or in the header."""
    folder = tiny.model(tmp_path / "base")
    adapted(folder, tmp_path)
    sync = os.fdatasync

    def flips_a_bit(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        end = start + json.loads(content[8:start])[name]["data_offsets"][1] if name else content.index(b"norm") + 4
        content[end - 2] ^= 1
        path.write_bytes(content)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", flips_a_bit)
    with pytest.raises(MergeError, match=problem):
        export.merge(Source("base", None, folder), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.model(tmp_path / "base")
    adapted(folder, tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(PreflightError, match="the disk is full, the merge needs"):
        export.merge(Source("base", None, folder), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_bases_that_cannot_be_merged_into(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base", shards=True)
    adapted(folder, tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(SettingsError, match="lacks model-00001"):
        export.merge(Source("base", None, folder), tmp_path)
    shard.write_bytes(content[:-10])
    with pytest.raises(SettingsError, match="ends within"):
        export.merge(Source("base", None, folder), tmp_path)
    shard.write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(SettingsError, match="quantised model"):
        export.merge(Source("base", None, folder), tmp_path)
