"""Tiny random models in a normal model folder, each with a tokenizer trained on the bundled rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).resolve().parent.parent / "finetune" / "samples"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def texts() -> list[str]:
    """The bundled rows' texts."""
    lines = [line for file in sorted(SAMPLES.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [value for line in lines for value in json.loads(line).values()]


def tokenizer(kind: str) -> Any:
    """llama: a BOS before each text, no PAD. qwen2: no BOS, ChatML with <|im_end|> as EOS, PAD of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"llama": ["<s>", "</s>", "<|reserved_0|>"], "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}[
        kind
    ]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    if kind == "llama":
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
        return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = CHAT
    return wrapped


def model(folder: Path, kind: str = "llama", shards: bool = False, **changes: Any) -> Path:
    """Write a two-layer model of `kind` (llama, qwen2, gpt2, ...) in bfloat16 into `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    words = tokenizer("qwen2" if kind.startswith("qwen") else "llama")
    if kind == "gpt2":
        sizes: dict[str, Any] = dict(n_embd=64, n_layer=2, n_head=4, n_positions=1024)
    else:
        sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)  # fmt: skip
    ids = dict(bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    config = AutoConfig.for_model(
        kind, **{**sizes, "vocab_size": len(words), "tie_word_embeddings": False, **ids, **changes}
    )
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder, max_shard_size="200KB" if shards else "1GB")
    words.save_pretrained(folder)
    return folder


def varlen_attention(q: Any, k: Any, v: Any, ends: Any, key_ends: Any, *_: Any, window_size: tuple[int, int]) -> Any:
    """What torch.nn.attention.varlen computes, for a CPU, where it has no kernel: each row by itself, to its last key."""
    import itertools

    import torch

    assert window_size == (-1, 0)
    parts = []
    for (start, end), (key_start, key_end) in zip(
        itertools.pairwise(ends.tolist()), itertools.pairwise(key_ends.tolist()), strict=True
    ):
        a, b, c = (
            states[slice(*where)].transpose(0, 1)[None]
            for states, where in ((q, (start, end)), (k, (key_start, key_end)), (v, (key_start, key_end)))
        )
        seen = torch.ones(end - start, key_end - key_start, dtype=torch.bool).tril(key_end - key_start - (end - start))
        out = torch.nn.functional.scaled_dot_product_attention(a, b, c, attn_mask=seen, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)
