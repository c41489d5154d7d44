"""Decoding by hand: the same tokens as transformers' generate, for every architecture that it serves, on the CPU in float32."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tiny
from finetune.inference import decode

LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": dict(rope_parameters=LLAMA3), "qwen2": {}, "qwen3": dict(head_dim=32), "mistral": dict(sliding_window=None),
    "gemma": dict(head_dim=32, tie_word_embeddings=True),
}  # fmt: skip
PROMPTS = [
    [5, 6, 7],
    list(range(20, 61)),
    [9],
    list(range(100, 117)),
    [3, 3, 3, 3],
    [40, 2],
    list(range(7, 30)),
    [11] * 30,
]
LIMIT = 40


def model(
    folder: Path, kind: str, four_bits: bool = False, adapted: bool = True, initializer_range: float = 0.3
) -> Any:
    """A tiny model that does not repeat itself, with an adapter that says something."""
    base = tiny.model(folder / kind, kind, initializer_range=initializer_range, **KINDS[kind])
    nf4 = (
        dict(quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")) if four_bits else {}
    )
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **nf4)
    if adapted:
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        loaded = get_peft_model(loaded, config)
        torch.manual_seed(1)
        for name, weight in loaded.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(0, 0.2)
    return loaded.eval()


def generated(loaded: Any, prompt: list[int], ends: list[int]) -> list[int]:
    made = loaded.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=LIMIT,
        do_sample=False, temperature=None, top_p=None, top_k=None, pad_token_id=0, eos_token_id=ends,
    )  # fmt: skip
    return list(made[0, len(prompt) :].tolist())


def decoded(decoder: decode.Decoder, prompts: list[list[int]], ends: list[int]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for some in decoder.tokens(prompts, LIMIT, ends):
        for row, new in zip(found, some, strict=True):
            row += new
    return found


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_generate(tmp_path: Path, kind: str, folded: bool) -> None:
    loaded = model(tmp_path, kind)
    assert decode.unserved(loaded) is None
    decoder = decode.Decoder(loaded, folded)
    free = [generated(loaded, prompt, [1]) for prompt in PROMPTS]
    assert len({tuple(row) for row in free}) == len(PROMPTS)
    ends = [free[1][5], free[4][9]]  # so that rows end at different places
    wanted = [generated(loaded, prompt, ends) for prompt in PROMPTS]
    assert len({len(row) for row in wanted}) > 1
    assert decoded(decoder, PROMPTS, ends) == wanted
    assert decoded(decoder, PROMPTS[3:4], ends) == wanted[3:4]


def test_four_bits_are_decoded_as_they_lie(tmp_path: Path) -> None:
    loaded = model(tmp_path, "llama", four_bits=True)
    assert decoded(decode.Decoder(loaded, False), PROMPTS[:2], [1]) == [generated(loaded, p, [1]) for p in PROMPTS[:2]]


def test_four_bits_are_folded_as_they_are_dequantized(tmp_path: Path) -> None:
    """bitsandbytes' product on a CPU rounds to 16 bits, so it is held against the same weights, dequantized by transformers."""
    loaded = model(tmp_path, "llama", four_bits=True)
    folded = decoded(decode.Decoder(loaded, True), PROMPTS[:2], [1])
    for module in loaded.get_base_model().model.layers.modules():
        base = getattr(module, "base_layer", module)
        if (hasattr(getattr(base, "weight", None), "quant_state") and module is not base) or type(
            module
        ).__name__ == "Linear4bit":
            weight = bitsandbytes.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
            for name in getattr(module, "lora_A", {}):
                weight = weight + module.scaling[name] * module.lora_B[name].weight @ module.lora_A[name].weight
            module.forward = functools.partial(torch.nn.functional.linear, weight=weight.detach())
    assert folded == [generated(loaded, prompt, [1]) for prompt in PROMPTS[:2]]


def test_what_is_not_served_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, changes, why in (
        ("gpt2", {}, "this is gpt2"),
        ("mistral", dict(sliding_window=64), "sliding window"),
        ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), "type dynamic"),
    ):
        place = tiny.model(tmp_path / f"{kind}-{len(changes)}", kind, **changes)
        assert why in str(decode.unserved(AutoModelForCausalLM.from_pretrained(place)))
    monkeypatch.setitem(sys.modules, "unsloth", None)  # imported by its engine alone, and it patches classes in place
    assert "unsloth has changed" in str(decode.unserved(model(tmp_path, "llama")))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_cache_takes_the_bytes_that_are_counted(tmp_path: Path, kind: str) -> None:
    decoder = decode.Decoder(loaded := model(tmp_path, kind, adapted=False), False)
    state = decode._State(
        decoder, len(PROMPTS), max(map(len, PROMPTS)) + LIMIT, torch.zeros(len(PROMPTS), dtype=torch.long)
    )
    assert decode.cache_bytes(loaded, PROMPTS, LIMIT) == sum(each.nbytes for each in [*state.keys, *state.values])
