"""The merge on real models of several architectures, against PEFT's own mathematics; and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import short_run
import tiny
from conftest import environment
from finetune import files
from finetune.errors import MachineError, MergeError, SettingsError
from finetune.run import record as records
from finetune.run import report
from finetune.sources.model import Source
from finetune.weights import adapter as adapters
from finetune.weights import layout, merge, shards, sums
from finetune.weights.compare import compare
from finetune.weights.sums import Counts

CASES: dict[str, dict[str, Any]] = {
    "llama": {}, "llama-sharded": {"shards": True}, "qwen2": {"tie_word_embeddings": True}, "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16}, "phi3": {"pad_token_id": 0}, "mistral": {}, "gpt2": {"tie_word_embeddings": True},
}  # fmt: skip
# Architectures with tensors that their checkpoints hold in float32 beside bfloat16 weights, and the ends of their names.
FLOAT32: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "deepseek_v3": (
        dict(n_routed_experts=16, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1, q_lora_rank=16,
             kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, num_key_value_heads=4),
        ("e_score_correction_bias", "norm.weight", "o_proj.weight", "q_a_proj.weight"),
    ),
    "falcon_h1": (
        dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16, head_dim=16),
        ("A_log", "dt_bias", ".D", "conv1d.weight"),
    ),
}  # fmt: skip
FULL_AND_LINEAR = dict(
    head_dim=16, layer_types=["full_attention", "linear_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip
TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=1000)  # fmt: skip
SIGHT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)  # fmt: skip


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
    layout.check_mergeable(model, Source("base", None, folder))
    adapters.save(model, Source("base", None, folder), output)
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def rewritten(folder: Path, change: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model in one file, after `change` was called with them."""
    values = tensors(folder)
    change(values)
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return values


def agree(model: PeftModel, merged: Path, within: float = 0.01) -> bool:
    """Whether the merged weights give the logits of base + adapter. within: what the rounding of targets to bfloat16 costs."""
    again = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        wanted, found = model(input_ids=ids).logits, again(input_ids=ids).logits
    return bool((wanted - found).abs().max() < within * wanted.abs().max() + within)


@pytest.mark.parametrize("case", CASES)
def test_merged_equals_base_plus_adapter(tmp_path: Path, case: str) -> None:
    folder = tiny.model(tmp_path / "base", case.partition("-")[0], **CASES[case])
    model = adapted(folder, tmp_path)
    done = merge.merge(Source("base", None, folder), tmp_path)
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
    merge.merge(Source("base", None, folder), tmp_path)
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
        monkeypatch.setattr(merge, "WORKERS", count)
        torch.set_num_threads(count)
        merge.merge(Source("base", None, folder), tmp_path)
        found.append(files.digests(tmp_path / "merged"))
    torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base" and str(tmp_path) not in json.dumps(config)


def test_a_merge_goes_on_meanwhile_and_knows_its_hashes(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base", shards=True)
    adapted(folder, tmp_path)
    with merge.meanwhile(Source("base", None, folder), tmp_path, "cpu", {}, wanted=True) as merging:
        pass
    done = merging.result()
    assert done and len(done.sha256) == 3
    assert done.sha256.items() <= files.digests(tmp_path, records.below(tmp_path)).items()
    with merge.meanwhile(Source("base", None, folder), tmp_path, "cpu", {}, wanted=False) as merging:
        pass
    assert merging.result() is None


def test_a_merge_ends_with_what_went_on_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal, or memory that runs out, while the model answers: no part of the merged weights stays."""
    folder = tiny.model(tmp_path / "base", shards=True)
    adapted(folder, tmp_path)
    monkeypatch.setattr(merge, "GROUP", 1)  # so that there is a block left to make
    begun, go_on, write = threading.Event(), threading.Event(), sums.Sums.write

    def waits(self: sums.Sums, block: sums.Block) -> None:
        begun.set()
        go_on.wait(30)
        write(self, block)

    monkeypatch.setattr(sums.Sums, "write", waits)

    def fails() -> None:
        with merge.meanwhile(Source("base", None, folder), tmp_path, "cpu", {}, wanted=True):
            begun.wait(30)
            threading.Timer(0.2, go_on.set).start()
            raise SystemExit(143)

    with pytest.raises(SystemExit, match="143"):
        fails()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("merged")]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("block", [1, 300, 2**20])
def test_blocks_are_parts_of_the_float64_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, block: int
) -> None:
    folder = tiny.model(tmp_path / "base", kind)
    adapted(folder, tmp_path)
    monkeypatch.setattr(shards, "BLOCK", block)
    done = merge.merge(Source("base", None, folder), tmp_path)
    adapter, merged = adapters.Adapter(tmp_path / "adapter"), tensors(tmp_path / "merged")
    targets = adapter.locate(shards.Base(folder))
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
    assert merge.merge(Source("base", None, folder), tmp_path).changed == 4


def test_layers_of_one_name_in_text_and_sight_are_told_apart_by_their_shape(tmp_path: Path) -> None:
    """Gemma 3: both have layers.0.self_attn.q_proj, under other names in files than in the model."""
    text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=1000)  # fmt: skip
    sight = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)  # fmt: skip
    folder = tiny.model(tmp_path / "base", "gemma3", text_config=text, vision_config=sight, mm_tokens_per_image=4)
    model = adapted(folder, tmp_path, target_modules=["q_proj", "o_proj", "down_proj"])
    assert merge.merge(Source("base", None, folder), tmp_path).changed == 7
    wanted = model.merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert wanted.keys() == found.keys()
    assert all((wanted[name] - found[name]).abs().max() <= 0.01 * wanted[name].abs().max() for name in wanted)


@pytest.mark.parametrize("kind", FLOAT32)
def test_float32_tensors_of_a_16_bit_base_keep_type_and_bytes(tmp_path: Path, kind: str) -> None:
    options, ends = FLOAT32[kind]
    folder = tiny.model(tmp_path / "base", kind, **options)

    def dequantize(values: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(2)
        for name in (name for name in values if name.endswith(ends)):
            # near 1, where bfloat16 is 0.008 apart: 16 biases would become one or two
            values[name] = 1 + 0.004 * torch.randn(values[name].shape) if values[name].dim() == 1 else values[name].float() * 1.001  # fmt: skip

    base = rewritten(folder, dequantize)
    model = adapted(folder, tmp_path, target_modules=["o_proj", "q_a_proj"])
    done = merge.merge(Source("base", None, folder), tmp_path)
    merged, targets = tensors(tmp_path / "merged"), adapters.Adapter(tmp_path / "adapter").locate(shards.Base(folder))
    for name, value in base.items():
        assert merged[name].dtype == value.dtype
        if name in targets:
            assert not torch.equal(merged[name], value)
        else:
            assert torch.equal(merged[name].view(torch.uint8), value.view(torch.uint8)), name
    wide = {name for name in base if base[name].dtype == torch.float32}
    assert len(wide) > 4 and (kind != "deepseek_v3" or wide & targets.keys())
    assert (done.changed, done.kept, done.rounded) == (len(targets), len(base) - len(targets), 0)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    # the targets of one are float32: its 16 experts are chosen as before, and nothing was rounded to 16 bits
    assert agree(model, tmp_path / "merged", *([1e-5] if kind == "deepseek_v3" else []))
    assert compare(Source("base", None, folder), tmp_path).kept == done.kept

    name = min(wide - targets.keys())
    rewritten(tmp_path / "merged", lambda values: values.update({name: values[name].bfloat16()}))
    with pytest.raises(SettingsError, match=f"holds other tensors than the base's model.safetensors.* {name}"):
        compare(Source("base", None, folder), tmp_path)
    rewritten(tmp_path / "merged", lambda values: values.update({name: values[name].float()}))
    with pytest.raises(SettingsError, match=f"{name} has no adapter, but is not the base's"):
        compare(Source("base", None, folder), tmp_path)


def test_a_float32_base_becomes_bfloat16_but_for_norms(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
    base = rewritten(folder, lambda values: [value.mul_(1.001) for value in values.values()])
    model = adapted(folder, tmp_path, target_modules=["q_proj"])
    done = merge.merge(Source("base", None, folder), tmp_path)
    merged = tensors(tmp_path / "merged")
    for name, value in base.items():
        assert merged[name].dtype == (torch.float32 if value.dim() == 1 else torch.bfloat16)
        assert "q_proj" in name or torch.equal(merged[name], value.to(merged[name].dtype)), name
    assert (done.changed, done.kept, done.rounded) == (2, 5, 14)
    assert compare(Source("base", None, folder), tmp_path) == Counts(2, 0, 0, None, 5, 14)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    assert agree(model, tmp_path / "merged")


@pytest.mark.parametrize("said", ["float32", "bfloat16", None])
def test_the_merged_config_says_the_type_that_the_weights_have(tmp_path: Path, said: str | None) -> None:
    """Of some models, BLOOM's among them, config.json says nothing or float32, and the weights are float16."""
    folder = tiny.model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": said} if said else {k: v for k, v in config.items() if k != "dtype"}))  # fmt: skip
    adapted(folder, tmp_path)
    merge.merge(Source("base", None, folder), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, value in tensors(tmp_path / "merged").items():
        assert value.dtype == loaded[name].dtype == torch.float16 and torch.equal(value, loaded[name]), name


@pytest.mark.parametrize("zipped", [True, False], ids=["of torch 1.6", "older"])
def test_a_pytorch_bin_base(tmp_path: Path, zipped: bool) -> None:
    folder = tiny.model(tmp_path / "base")
    base = load_file(folder / "model.safetensors")
    torch.save(base, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()
    adapted(folder, tmp_path)
    done = merge.merge(Source("base", None, folder), tmp_path)
    merged = tensors(tmp_path / "merged")
    assert done.changed == 14 == sum(not torch.equal(merged[name], base[name]) for name in base)
    assert compare(Source("base", None, folder), tmp_path).changed == 14
    short_run.fit(folder, tmp_path / "checkpoints", MAX_STEPS="1")  # training loads it too


@pytest.mark.parametrize("sight", [False, True], ids=["text alone", "with a tower for pictures"])
def test_layers_that_are_not_loaded_are_not_merged_into(tmp_path: Path, sight: bool) -> None:
    """Qwen3.5: its files hold the language model under a name of its own, a tower, and a layer that predicts further tokens."""
    folder = tiny.model(tmp_path / "base", "qwen3_5_text", **FULL_AND_LINEAR)
    if sight:
        text = AutoConfig.from_pretrained(folder).to_dict()
        size = dict(
            depth=2, hidden_size=64, num_heads=4, intermediate_size=128, out_hidden_size=64, num_position_embeddings=16
        )
        config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=size)
        made = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        made.save_pretrained(folder)

    def add(values: dict[str, torch.Tensor]) -> None:
        for name in [name for name in values if name.startswith("model.") and not sight]:
            values["model.language_model." + name.removeprefix("model.")] = values.pop(name)
        for name in [name for name in values if "language_model.layers.0." in name]:
            values[name.replace("model.language_model.layers", "mtp.layers")] = values[name] + 1

    base = rewritten(folder, add)
    model = adapted(folder, tmp_path, target_modules=["q_proj", "o_proj", "out_proj"])
    assert merge.merge(Source("base", None, folder), tmp_path).changed == 3
    merged = tensors(tmp_path / "merged")
    moved = {name for name in base if not torch.equal(base[name], merged[name])}
    assert len(moved) == 3 and all(name.startswith("model.language_model.layers.") for name in moved)
    assert "mtp.layers.0.self_attn.q_proj.weight" in base and sight == any("visual" in name for name in base)
    assert agree(model, tmp_path / "merged")


def old_names(values: dict[str, torch.Tensor]) -> None:
    """As Google's files name them."""
    for name in [name for name in values if name.startswith("vision_tower.")]:
        values[name.replace("vision_tower.", "vision_tower.vision_model.")] = values.pop(name)


@pytest.mark.parametrize("change", [dict, old_names], ids=["names of today", "names of then"])
def test_layers_of_text_and_sight_are_told_apart_though_their_shapes_are_equal(tmp_path: Path, change: Any) -> None:
    folder = tiny.model(tmp_path / "base", "gemma3", text_config=TEXT, vision_config=SIGHT, mm_tokens_per_image=4)
    base = rewritten(folder, change)
    assert [value.shape for name, value in base.items() if "layers.0.self_attn.q_proj.weight" in name] == [(64, 64)] * 2
    for targets, moved in (
        ("q_proj", 3),
        (r".*language_model.*\.(q_proj|fc1|down_proj)", 4),
        (r".*encoder.*\.(q_proj|fc1)", 2),
    ):
        model = adapted(folder, tmp_path, target_modules=[targets] if targets == "q_proj" else targets)
        assert merge.merge(Source("base", None, folder), tmp_path).changed == moved
        wanted = model.merge_and_unload().state_dict()
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
        assert wanted.keys() == found.keys()
        assert all((wanted[name] - found[name]).abs().max() <= 0.01 * wanted[name].abs().max() for name in wanted)


PROCESSOR = """
import json, sys
from pathlib import Path
from transformers import AutoProcessor, Gemma3ImageProcessor, Gemma3Processor
import tiny
what, folder = sys.argv[1], Path(sys.argv[2])
if what == "make":
    special = dict(boi_token="<start>", eoi_token="<end>", image_token="<image>")
    words = tiny.tokenizer("llama")
    words = type(words)(tokenizer_object=words.backend_tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=special)
    processor = Gemma3Processor(Gemma3ImageProcessor(size=dict(height=28, width=28)), words, image_seq_length=4)
    processor.save_pretrained(folder)
else:
    from PIL import Image
    made = AutoProcessor.from_pretrained(folder)(text="a <start> b", images=[[Image.new("RGB", (40, 30), "red")]])
    print(json.dumps([type(AutoProcessor.from_pretrained(folder)).__name__, made["input_ids"], list(made["pixel_values"][0].shape)]))
"""


def test_a_model_that_takes_pictures_keeps_its_processor(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base", "gemma3", text_config=TEXT, vision_config=SIGHT, mm_tokens_per_image=4)

    def processor(what: str, folder: Path) -> str:
        """In a process of its own: this one may have been told to do without torchvision."""
        command = [sys.executable, "-c", PROCESSOR, what, str(folder)]
        values = environment(PYTHONPATH=str(Path(__file__).resolve().parent.parent))
        answer = subprocess.run(command, capture_output=True, text=True, env=values, timeout=280)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    processor("make", folder)
    # files of older repositories, read where there is no processor_config.json that holds it all
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    (folder / "video_preprocessor_config.json").write_text("{}")
    adapted(folder, tmp_path, target_modules=["o_proj"])
    merge.merge(Source("base", None, folder), tmp_path)
    names = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
    for name in names:
        assert (tmp_path / "merged" / name).read_bytes() == (folder / name).read_bytes()
    assert Source("base", None, folder).digests.keys() >= set(names)
    assert processor("use", tmp_path / "merged") == processor("use", folder)


def test_layers_that_training_never_reached_are_told_from_too_small_learning(tmp_path: Path) -> None:
    """Text alone gives the tower for pictures no gradient."""
    folder = tiny.model(tmp_path / "base", "gemma3", text_config=TEXT, vision_config=SIGHT, mm_tokens_per_image=4)
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], bias="lora_only")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        ids = torch.arange(3, 60)[None]
        model(input_ids=ids, labels=ids, token_type_ids=torch.zeros_like(ids)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapters.save(model, Source("base", None, folder), tmp_path)
    # one of those that did learn is left with too little
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    values = load_file(path)
    save_file({n: v * 1e-25 if "language_model.layers.1.self_attn.v_proj.lora_" in n else v for n, v in values.items()}, path)  # fmt: skip
    done = merge.merge(Source("base", None, folder), tmp_path)
    assert (done.changed, done.rounded_away, done.unreached) == (3, 1, 4)  # of the tower two weights and their biases
    assert done.unreached_first == "vision_tower.encoder.layers.0.self_attn.q_proj.bias"
    assert compare(Source("base", None, folder), tmp_path).unreached == 4
    training = dict(steps=1, losses=[2.0, 1.0])
    record: Any = dict(training=training, verification=done.record(), timings=dict(total_s=1), settings=dict(MAX_NEW_TOKENS=0))  # fmt: skip
    said = report.summary(tmp_path, record)
    assert "note: 1 adapted tensors did not change: the learning was too small for 16 bits" in said
    assert (
        f"note: 4 adapted tensors did not change: nothing was learned for them, as for {done.unreached_first}; TARGET_MODULES may"
        in said
    )
    record["verification"] |= dict(changed=0, rounded_away=0)  # nothing at all: MAX_STEPS=1 with a warm-up
    assert "learning rate of 0 where WARMUP_STEPS is not 0" in (said := report.summary(tmp_path, record))
    assert "TARGET_MODULES" not in said


def test_of_several_forms_the_one_that_is_trained_is_merged_into(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base", shards=True)
    save_file({n: v * 2 for n, v in tensors(folder).items()}, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("shards that an older save left", "an index without its shards"):
        model = adapted(folder, tmp_path)
        assert merge.merge(Source("base", None, folder), tmp_path).changed == 14
        wanted = model.get_base_model().state_dict()["model.norm.weight"]
        assert torch.equal(tensors(tmp_path / "merged")["model.norm.weight"].float(), wanted), name
        for shard in folder.glob("model-*.safetensors"):
            shard.unlink()


def test_learning_too_small_for_16_bits_is_counted(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base")
    adapted(folder, tmp_path)
    values = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(
        {n: v * 1e-25 if "lora_" in n else v for n, v in values.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    done = merge.merge(Source("base", None, folder), tmp_path)
    assert (done.changed, done.rounded_away, done.unreached) == (0, 14, 0)


def test_the_original_eos_and_generation_config_stay(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": true}')
    adapted(folder, tmp_path)
    merge.merge(Source("base", None, folder), tmp_path)
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
        merge.merge(Source("base", None, folder), tmp_path)
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
        merge.merge(Source("base", None, folder), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.model(tmp_path / "base")
    adapted(folder, tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(MachineError, match="the disk is full, the merge needs"):
        merge.merge(Source("base", None, folder), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_bases_that_cannot_be_merged_into(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "base", shards=True)
    adapted(folder, tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(SettingsError, match="lacks model-00001"):
        merge.merge(Source("base", None, folder), tmp_path)
    shard.write_bytes(content[:-10])
    with pytest.raises(MachineError, match="not a whole safetensors file"):
        merge.merge(Source("base", None, folder), tmp_path)
    shard.write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(SettingsError, match="its weights are quantised"):
        merge.merge(Source("base", None, folder), tmp_path)
