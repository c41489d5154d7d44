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
from finetune import engines, hub, preflight
from finetune.engines import transformers as engine
from finetune.errors import PreflightError, SettingsError
from finetune.settings import Settings


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., hub.Source]:
    """A model with tensors left out and values of its config changed."""

    def make(without: str = "", **config: Any) -> hub.Source:
        folder = tiny.model(tmp_path / "broken")
        kept = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name != without}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (values | config).items() if v is not None}))
        return hub.Source(str(folder), None, folder)

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
    engines.Choice("transformers", "ENGINE=transformers").open(Settings.from_env({}))
    assert {record.message for record in caplog.records} == {"no library"}


@pytest.mark.parametrize("four_bits", ["0", "1"])
def test_a_missing_tensor_is_named_and_not_drawn_at_random(broken: Callable[..., hub.Source], four_bits: str) -> None:
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
def test_a_config_of_another_model_is_named(
    broken: Callable[..., hub.Source], config: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words) as refused:
        engine.load(Settings.from_env({"LOAD_IN_4BIT": "0"}), broken(**config))
    assert len(str(refused.value)) < 1500


def test_tied_weights_are_not_missed(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "tied", "qwen2", tie_word_embeddings=True)
    engine.load(Settings.from_env({"LOAD_IN_4BIT": "0"}), hub.Source(str(folder), None, folder))


def test_a_file_that_ends_early_is_found_before_anything_is_loaded(broken: Callable[..., hub.Source]) -> None:
    source = broken()
    file = source.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(PreflightError, match="not a whole safetensors file"):
        preflight.parameters(source.name)


def test_rows_that_a_model_has_no_embedding_for_are_refused(tmp_path: Path, llama: Path) -> None:
    folder = tiny.model(tmp_path / "gpt2", "gpt2")
    settings = Settings.from_env({"LOAD_IN_4BIT": "0", "TARGET_MODULES": "all-linear"})
    gpt2, other = (engine.load(settings, hub.Source(str(place), None, place)) for place in (folder, llama))
    fits: Any = SimpleNamespace(longest=1024, largest=900)
    engines.check_fits(gpt2, settings, fits)
    with pytest.raises(
        SettingsError, match=r"MAX_SEQ_LENGTH=2048: a row has 1025 tokens.*for example MAX_SEQ_LENGTH=1024"
    ):
        engines.check_fits(gpt2, settings, SimpleNamespace(longest=1025, largest=900))  # type: ignore[arg-type]
    engines.check_fits(other, settings, SimpleNamespace(longest=10**6, largest=900))  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="makes token 1000, and the model has 1000"):
        engines.check_fits(other, settings, SimpleNamespace(longest=8, largest=1000))  # type: ignore[arg-type]


def test_the_compiled_path_is_for_what_its_kernels_can_do() -> None:
    gpu = preflight.Gpu("NVIDIA H100 80GB HBM3", 81559, 81079, "580.159.04", (9, 0))
    settings = Settings.from_env({})
    assert engines.choose(settings, gpu, dict(model_type="llama", attention_dropout=0.0)).compiled
    for odd in (dict(model_type="gemma"), dict(model_type="qwen2", use_sliding_window=True), dict(model_type="llama", attention_dropout=0.1), dict(model_type="llama", hidden_size=3200), dict(model_type="llama", head_dim=288)):  # fmt: skip
        assert not engines.choose(settings, gpu, odd).compiled
    for damaged in (dict(hidden_size="64"), dict(num_attention_heads=0, hidden_size=64), dict(head_dim=None)):
        engines.choose(settings, gpu, dict(model_type="llama", **damaged))


def test_biases_in_float16_are_refused_and_not_found_out_by_the_first_update(llama: Path, qwen2: Path) -> None:
    settings = Settings.from_env({"LOAD_IN_4BIT": "0", "DTYPE": "float16", "LORA_BIAS": "all"})
    fits: Any = SimpleNamespace(longest=8, largest=8)
    without, biased = (engine.load(settings, hub.Source(str(place), None, place)) for place in (llama, qwen2))
    engines.check_fits(without, settings, fits)
    with pytest.raises(SettingsError, match=r"LORA_BIAS=all: .*float16"):
        engines.check_fits(biased, settings, fits)


def test_experts_that_stay_in_16_bits_are_said(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixtral = tiny.model(tmp_path / "mixtral", "mixtral", num_local_experts=4)
    for folder, said in ((llama, False), (mixtral, True)):
        for four_bits in ("1", "0"):
            settings = Settings.from_env({"LOAD_IN_4BIT": four_bits, "TARGET_MODULES": "q_proj"})
            engine.load(settings, hub.Source(str(folder), None, folder))
            assert ("experts stay" in capsys.readouterr().out) == (said and four_bits == "1")


@pytest.mark.parametrize(("kind", "sizes"), [("gptj", dict(rotary_dim=8)), ("openai-gpt", {})])
def test_positions_that_are_computed_once_are_known_too(tmp_path: Path, kind: str, sizes: dict[str, int]) -> None:
    folder = tiny.model(tmp_path / kind, kind, max_position_embeddings=64, **sizes)
    settings = Settings.from_env({"LOAD_IN_4BIT": "0", "TARGET_MODULES": "all-linear"})
    model = engine.load(settings, hub.Source(kind, None, folder))
    engines.check_fits(model, settings, SimpleNamespace(longest=64, largest=900))  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="for example MAX_SEQ_LENGTH=64"):
        engines.check_fits(model, settings, SimpleNamespace(longest=65, largest=900))  # type: ignore[arg-type]


def test_layers_that_peft_refuses_are_named(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "mamba", "mamba", state_size=8)
    settings = Settings.from_env({"LOAD_IN_4BIT": "0", "TARGET_MODULES": "all-linear"})
    with pytest.raises(SettingsError, match=r"TARGET_MODULES=all-linear: .*'out_proj' is incompatible.*which are dt_proj,in_proj,out_proj,x_proj$"):  # fmt: skip
        engine.load(settings, hub.Source("mamba", None, folder))


def test_a_model_that_cannot_be_computed_so_is_refused_before_training(tmp_path: Path) -> None:
    """Mamba multiplies with the weight of a layer itself, which in 4 bits is no matrix."""
    folder = tiny.model(tmp_path / "mamba", "mamba", state_size=8)
    named = {"TARGET_MODULES": "in_proj,x_proj"}
    with pytest.raises(SettingsError, match=r"MODEL_NAME=mamba: cannot be .*try LOAD_IN_4BIT=0"):
        engine.load(Settings.from_env({"LOAD_IN_4BIT": "1", **named}), hub.Source("mamba", None, folder))
    engine.load(Settings.from_env({"LOAD_IN_4BIT": "0", **named}), hub.Source("mamba", None, folder))


def test_an_architecture_that_cannot_recompute_does_not(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "jetmoe", "jetmoe", num_local_experts=4, kv_channels=16)
    settings = Settings.from_env({"LOAD_IN_4BIT": "0", "TARGET_MODULES": "kv_proj"})
    assert engine.layers(engine.load(settings, hub.Source("jetmoe", None, folder))) == 0


def test_an_adapter_beside_the_model_is_refused(broken: Callable[..., hub.Source]) -> None:
    """transformers would train on top of it, and the merge would lack it."""
    source = broken()
    settings = Settings.from_env({"MODEL_NAME": source.name})
    assert hub.fetch_model(settings).folder == source.folder
    (source.folder / "adapter_config.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"MODEL_NAME=.*holds an adapter \(adapter_config\.json\) beside the model"):
        hub.fetch_model(settings)


def test_memory_that_runs_out_where_nothing_can_be_halved_is_no_bug() -> None:
    with (
        pytest.raises(PreflightError, match=r"out of GPU memory \(CUDA out of memory\)\. .*MAX_MEMORY=12"),
        engines.memory_told(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="other"), engines.memory_told():
        raise RuntimeError("other")
