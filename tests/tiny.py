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

MAMBA = dict(mamba_n_heads=4, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=16)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_key_value_heads=4, n_group=1, topk_group=1, first_k_dense_replace=1)  # fmt: skip
# what some architectures need beside the sizes that all have
NEEDED: dict[str, dict[str, Any]] = dict(
    falcon_h1=dict(mamba_d_ssm=64, mamba_d_head=16, head_dim=16, **MAMBA),
    granitemoehybrid=dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=64, mamba_d_head=32, mamba_expand=2, layer_types=["mamba", "attention"], **MAMBA),
    gemma2=dict(head_dim=16),
    llama4_text=dict(head_dim=16, intermediate_size_mlp=128, num_local_experts=2, attention_chunk_size=64),
    mamba=dict(state_size=8),
    mamba2=dict(num_heads=4, head_dim=32, state_size=8, n_groups=1, expand=2),
    deepseek_v2=LATENT,
    deepseek_v3=LATENT,
    mpt=dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=64),
    gemma3n_text=dict(head_dim=16, hidden_size_per_layer_input=16, vocab_size_per_layer_input=1000, num_kv_shared_layers=0, intermediate_size=[128, 128], layer_types=["sliding_attention", "full_attention"], laurel_rank=8, activation_sparsity_pattern=[0.0, 0.0]),
)  # fmt: skip


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
        kind,
        **{**sizes, "vocab_size": len(words), "tie_word_embeddings": False, **ids, **NEEDED.get(kind, {}), **changes},
    )
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder, max_shard_size="200KB" if shards else "1GB")
    words.save_pretrained(folder)
    return folder


def seeing(folder: Path, kind: str) -> Path:
    """Write a model of `kind` (gemma3 or gemma4) that takes pictures beside text."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    words = tokenizer("llama")
    ids = dict(bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.bos_token_id)
    text = dict(vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, layer_types=["sliding_attention", "full_attention"], **ids)  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    tokens = dict(boi_token_id=6, eoi_token_id=7)
    if kind == "gemma4":
        text |= dict(
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=len(words),
            global_head_dim=16,
            num_kv_shared_layers=0,
        )
        vision |= dict(num_key_value_heads=2, head_dim=16)
        tokens |= dict(image_token_id=5, audio_token_id=8, video_token_id=11, boa_token_id=9, eoa_token_index=10)
        more: dict[str, Any] = dict(audio_config=None)
    else:
        more = dict(image_token_index=5, mm_tokens_per_image=4, boi_token_index=6, eoi_token_index=7)
        tokens = {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **tokens, **more)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def varlen_attention(
    q: Any, k: Any, v: Any, cu_seqlens: Any, cu_seqlens_k: Any, *_: Any, window_size: tuple[int, int]
) -> Any:
    """What torch.nn.attention.varlen computes, for a CPU, where it has no kernel: each row by itself, to its last key."""
    import itertools

    import torch

    assert window_size == (-1, 0)
    parts = []
    for (start, end), (key_start, key_end) in zip(
        itertools.pairwise(cu_seqlens.tolist()), itertools.pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        a, b, c = (
            states[slice(*where)].transpose(0, 1)[None]
            for states, where in ((q, (start, end)), (k, (key_start, key_end)), (v, (key_start, key_end)))
        )
        seen = torch.ones(end - start, key_end - key_start, dtype=torch.bool).tril(key_end - key_start - (end - start))
        out = torch.nn.functional.scaled_dot_product_attention(a, b, c, attn_mask=seen, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)
