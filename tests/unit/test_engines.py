"""What is refused while a model is loaded: files that are not those of the model, and rows that do not fit it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from finetune import sources
from finetune.engines import adapter, checks, passes, refusals, targets
from finetune.engines import plain as engine
from finetune.engines.choose import Choice, choose
from finetune.errors import MachineError, SettingsError
from finetune.machine import gpus
from finetune.settings import Settings
from finetune.sources.model import Source
from finetune.weights import adapter as weights_adapter
from finetune.weights import layout
from finetune.weights.parameters import parameters
from short_run import fit


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., Source]:
    """A model with tensors left out and values of its config changed."""

    def make(without: str = "", **config: Any) -> Source:
        folder = tiny.model(tmp_path / "broken")
        kept = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name != without}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (values | config).items() if v is not None}))
        return Source(str(folder), None, folder)

    return make


def test_what_a_library_notes_while_it_is_imported_is_not_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def imported(name: str) -> Any:
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("no module named kernels")
        logging.getLogger("bitsandbytes.cextension").error("no library")
        return engine

    monkeypatch.setattr("importlib.import_module", imported)
    monkeypatch.setattr(engine, "prepare", lambda settings: None)
    Choice("transformers", "ENGINE=transformers").open(Settings.from_env({}))
    assert {record.message for record in caplog.records} == {"no library"}


@pytest.mark.parametrize("four_bits", ["0", "1"])
def test_a_missing_tensor_is_named_and_not_drawn_at_random(broken: Callable[..., Source], four_bits: str) -> None:
    with pytest.raises(SettingsError, match=r"model\.embed_tokens\.weight is missing"):
        engine.load(Settings.from_env({"LOAD_IN_4BIT": four_bits}), broken("model.embed_tokens.weight"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(num_hidden_layers=4, layer_types=None), r"model\.layers\.2\..* is missing.* more"),
        (dict(intermediate_size=256), r"gate_proj\.weight has shape \[128, 64\], not \[256, 64\]"),
        (dict(hidden_size="64"), "cannot be loaded as a causal language model"),
        (dict(model_type="t5"), "cannot be loaded as a causal language model"),
    ],
)
def test_a_config_of_another_model_is_named(broken: Callable[..., Source], config: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words) as refused:
        engine.load(Settings.from_env({"LOAD_IN_4BIT": "0"}), broken(**config))
    assert len(str(refused.value)) < 1500


def test_tied_weights_are_not_missed(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "tied", "qwen2", tie_word_embeddings=True)
    engine.load(Settings.from_env({"LOAD_IN_4BIT": "0"}), Source(str(folder), None, folder))


def test_a_file_that_ends_early_is_found_before_anything_is_loaded(broken: Callable[..., Source]) -> None:
    source = broken()
    file = source.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(MachineError, match="not a whole safetensors file"):
        parameters(source)


def test_rows_that_a_model_has_no_embedding_for_are_refused(tmp_path: Path, llama: Path) -> None:
    folder = tiny.model(tmp_path / "gpt2", "gpt2")
    settings = Settings.from_env({"LOAD_IN_4BIT": "0", "TARGET_MODULES": "all-linear"})
    gpt2, other = (engine.load(settings, Source(str(place), None, place)) for place in (folder, llama))
    fits: Any = SimpleNamespace(longest=1024, largest=900)
    checks.check_fits(gpt2, settings, fits)
    with pytest.raises(
        SettingsError, match=r"MAX_SEQ_LENGTH=2048: a row has 1025 tokens.*for example MAX_SEQ_LENGTH=1024"
    ):
        checks.check_fits(gpt2, settings, SimpleNamespace(longest=1025, largest=900))  # type: ignore[arg-type]
    checks.check_fits(other, settings, SimpleNamespace(longest=10**6, largest=900))  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="makes token 1000, and the model has 1000"):
        checks.check_fits(other, settings, SimpleNamespace(longest=8, largest=1000))  # type: ignore[arg-type]


def test_the_compiled_path_is_for_what_its_kernels_can_do() -> None:
    gpu = gpus.Gpu("NVIDIA H100 80GB HBM3", 81559, 81079, "580.159.04", (9, 0))
    settings = Settings.from_env({})
    assert choose(settings, gpu, dict(model_type="llama", attention_dropout=0.0)).compiled
    for odd in (dict(model_type="gemma"), dict(model_type="qwen2", use_sliding_window=True), dict(model_type="llama", attention_dropout=0.1), dict(model_type="llama", hidden_size=3200), dict(model_type="llama", head_dim=288)):  # fmt: skip
        assert not choose(settings, gpu, odd).compiled
    for damaged in (dict(hidden_size="64"), dict(num_attention_heads=0, hidden_size=64), dict(head_dim=None)):
        choose(settings, gpu, dict(model_type="llama", **damaged))


def test_biases_in_float16_are_refused_and_not_found_out_by_the_first_update(llama: Path, qwen2: Path) -> None:
    settings = Settings.from_env({"LOAD_IN_4BIT": "0", "DTYPE": "float16", "LORA_BIAS": "all"})
    fits: Any = SimpleNamespace(longest=8, largest=8)
    without, biased = (engine.load(settings, Source(str(place), None, place)) for place in (llama, qwen2))
    checks.check_fits(without, settings, fits)
    with pytest.raises(SettingsError, match=r"LORA_BIAS=all: .*float16"):
        checks.check_fits(biased, settings, fits)


def test_experts_that_stay_in_16_bits_are_said(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixtral = tiny.model(tmp_path / "mixtral", "mixtral", num_local_experts=4)
    for folder, said in ((llama, False), (mixtral, True)):
        for four_bits in ("1", "0"):
            settings = Settings.from_env({"LOAD_IN_4BIT": four_bits, "TARGET_MODULES": "q_proj"})
            engine.load(settings, Source(str(folder), None, folder))
            assert ("experts stay" in capsys.readouterr().out) == (said and four_bits == "1")


@pytest.mark.parametrize(
    ("kind", "sizes"), [("gptj", dict(rotary_dim=8)), ("openai-gpt", {}), ("mpt", dict(max_seq_len=64))]
)
def test_positions_that_are_computed_are_known_too(tmp_path: Path, kind: str, sizes: dict[str, int]) -> None:
    """Once and for all, or as MPT's biases for so many positions in each pass."""
    folder = tiny.model(tmp_path / kind, kind, **dict(max_position_embeddings=64) if kind != "mpt" else {}, **sizes)
    settings = Settings.from_env({"LOAD_IN_4BIT": "0", "TARGET_MODULES": "all-linear"})
    model = engine.load(settings, Source(kind, None, folder))
    checks.check_fits(model, settings, SimpleNamespace(longest=64, largest=900))  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="for example MAX_SEQ_LENGTH=64"):
        checks.check_fits(model, settings, SimpleNamespace(longest=65, largest=900))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "named", "words"),
    [
        ("mamba", "all-linear", "'out_proj' is incompatible"),
        ("mamba", "in_proj,x_proj,dt_proj", "dt_proj would not be trained"),
        ("mamba2", "q_proj", "has no q_proj"),
        ("falcon_h1", "all-linear", "'out_proj' is incompatible"),
        ("deepseek_v2", "q_proj,k_proj", "has no q_proj, k_proj"),
        ("deepseek_v3", "gate_proj", "without also targeting up_proj"),
        ("llama4_text", "all-linear", "'tuple' object has no attribute 'dtype'"),
    ],
)
def test_what_is_suggested_in_place_of_refused_layers_trains(tmp_path: Path, kind: str, named: str, words: str) -> None:
    folder = tiny.model(tmp_path / kind, kind)
    source = Source(kind, None, folder)
    settings = Settings.from_env({"LOAD_IN_4BIT": "0", "TARGET_MODULES": named, "MODEL_NAME": str(folder)})
    with pytest.raises(
        SettingsError, match=f"TARGET_MODULES={named}: .*{words}.*for example TARGET_MODULES="
    ) as refused:
        engine.load(settings, source)
    suggested = str(refused.value).rpartition("TARGET_MODULES=")[2]
    assert suggested and not {"out_proj", "dt_proj", "router"} & {*suggested.split(",")}
    layout.check_mergeable(engine.load(settings.replaced(target_modules=tuple(suggested.split(","))), source), source)
    fit(folder, tmp_path / "run", MAX_STEPS="1", TARGET_MODULES=suggested)


def test_an_attempt_that_failed_leaves_no_adapter_behind(llama: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    before = [(name, type(module)) for name, module in model.named_modules()]
    get_peft_model(model, LoraConfig(target_modules="all-linear"))
    adapter.take_off(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["bert", "electra", "roberta", "bert-generation", "llama", "qwen2"])
def test_a_model_that_sees_the_tokens_to_come_is_refused(tmp_path: Path, kind: str) -> None:
    """By its configuration where that tells, else by what it does: BertGeneration's `is_decoder` is looked at by nobody."""
    told = kind in ("llama", "qwen2")
    source = Source(kind, None, tiny.model(tmp_path / "base", kind, **dict(is_causal=False) if told else {}))
    settings = Settings.from_env({"LOAD_IN_4BIT": "0", "TARGET_MODULES": "all-linear"})
    with pytest.raises(SettingsError, match=f"MODEL_NAME={kind}: is not a causal language model: .*later tokens"):
        engine.load(settings, source)
    if kind != "bert-generation":
        with pytest.raises(SettingsError, match="is not a causal language model"):
            checks.check_causal(source)  # all that unsloth's engine can ask


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", dict(is_decoder=True)), ("bert-generation", dict(is_decoder=True)), ("gpt_neox", {}), ("mixtral", dict(num_local_experts=4)),
        ("mamba2", {}), ("llama4_text", {}), ("gemma2", {}), ("granitemoehybrid", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_causal_model_is_not_taken_for_another(
    tmp_path: Path, kind: str, changes: dict[str, Any], dtype: str
) -> None:
    """Also where experts round otherwise, since other tokens come to them, and where the configuration has an `is_decoder` of no meaning."""
    source = Source(kind, None, tiny.model(tmp_path / "base", kind, **changes))
    named = (
        "in_proj"
        if kind == "mamba2"
        else "q_proj"
        if kind in ("llama4_text", "mixtral", "granitemoehybrid")
        else "all-linear"
    )
    engine.load(Settings.from_env({"LOAD_IN_4BIT": "0", "TARGET_MODULES": named, "DTYPE": dtype}), source)


@pytest.mark.parametrize("drawn", [False, True])
def test_looking_at_a_model_draws_nothing(tmp_path: Path, drawn: bool) -> None:
    source = Source("gpt2", None, tiny.model(tmp_path / "gpt2", "gpt2"))  # which drops out
    settings = Settings.from_env(
        {"LOAD_IN_4BIT": "0", "TARGET_MODULES": "c_attn", "LORA_DROPOUT": "0.5" if drawn else "0"}
    )
    model = engine.load(settings, source)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    passes.is_causal(model, torch.float32)
    passes.without_gradient(model, ["c_attn"], torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_gemma_3n_in_4_bits_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """It clamps weights in training, which in 4 bits are no numbers to clamp."""
    folder = tiny.model(tmp_path / "gemma3n", "gemma3n_text")
    with pytest.raises(SettingsError, match=r"MODEL_NAME=gemma3n: cannot be .*try LOAD_IN_4BIT=0"):
        engine.load(Settings.from_env({"LOAD_IN_4BIT": "1"}), Source("gemma3n", None, folder))
    engine.load(Settings.from_env({"LOAD_IN_4BIT": "0"}), Source("gemma3n", None, folder))


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
@pytest.mark.parametrize("named", ["q_proj,v_proj", "all-linear"])
def test_only_the_text_decoder_of_a_model_that_sees_is_adapted(
    tmp_path: Path, kind: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tiny.seeing(tmp_path / kind, kind)
    settings = Settings.from_env({"LOAD_IN_4BIT": "0", "TARGET_MODULES": named, "MODEL_NAME": str(folder)})
    model = engine.load(settings, Source(kind, None, folder))
    assert capsys.readouterr().out.count("parts for pictures and sound stay as they are") == 1
    layers = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    assert layers and all(name.startswith("model.language_model.") for name in layers)
    assert {name.rpartition(".")[2] for name in layers} >= {"q_proj", "v_proj"}
    assert (len({name.rpartition(".")[2] for name in layers}) == 2) == (named != "all-linear")
    assert engine.layers(model) == 2
    weights_adapter.save(model, Source(kind, None, folder), tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert {name for name, module in again.get_base_model().named_modules() if hasattr(module, "lora_A")} == {*layers}
    layout.check_mergeable(model, Source(kind, None, folder))
    fit(folder, tmp_path / "run", MAX_STEPS="1", TARGET_MODULES=named)
    only_seen = "fc1" if kind == "gemma3" else "linear"
    with pytest.raises(SettingsError, match=f"has no {only_seen} that can be adapted"):
        engine.load(settings.replaced(target_modules=(only_seen,)), Source(kind, None, folder))


def test_a_model_of_text_is_told_what_the_settings_say(llama: Path) -> None:
    from transformers import AutoModelForCausalLM, BartConfig, BartForCausalLM

    assert targets.outside_text(AutoModelForCausalLM.from_pretrained(llama)) == ""
    halves = BartConfig(d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, vocab_size=20)
    assert targets.outside_text(BartForCausalLM(halves)) == ""  # its configuration is of an encoder too, which it lacks
    assert targets.targets(["q_proj", "v_proj"], [], "") == ["q_proj", "v_proj"]
    assert targets.targets(("all-linear",), [], "") == "all-linear"


def test_a_model_that_cannot_be_computed_so_is_refused_before_training(tmp_path: Path) -> None:
    """Mamba multiplies with the weight of a layer itself, which in 4 bits is no matrix."""
    folder = tiny.model(tmp_path / "mamba", "mamba", state_size=8)
    named = {"TARGET_MODULES": "in_proj,x_proj"}
    with pytest.raises(SettingsError, match=r"MODEL_NAME=mamba: cannot be .*try LOAD_IN_4BIT=0"):
        engine.load(Settings.from_env({"LOAD_IN_4BIT": "1", **named}), Source("mamba", None, folder))
    engine.load(Settings.from_env({"LOAD_IN_4BIT": "0", **named}), Source("mamba", None, folder))


def test_an_architecture_that_cannot_recompute_does_not(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "jetmoe", "jetmoe", num_local_experts=4, kv_channels=16)
    settings = Settings.from_env({"LOAD_IN_4BIT": "0", "TARGET_MODULES": "kv_proj"})
    assert engine.layers(engine.load(settings, Source("jetmoe", None, folder))) == 0


def test_an_adapter_beside_the_model_is_refused(broken: Callable[..., Source]) -> None:
    """transformers would train on top of it, and the merge would lack it."""
    source = broken()
    settings = Settings.from_env({"MODEL_NAME": source.name})
    assert sources.fetch_model(settings).folder == source.folder
    (source.folder / "adapter_config.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"MODEL_NAME=.*holds an adapter \(adapter_config\.json\) beside the model"):
        sources.fetch_model(settings)


def test_memory_that_runs_out_where_nothing_can_be_halved_is_no_bug() -> None:
    with (
        pytest.raises(MachineError, match=r"out of GPU memory \(CUDA out of memory\)\. .*MAX_MEMORY=12"),
        refusals.memory_told(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="other"), refusals.memory_told():
        raise RuntimeError("other")
