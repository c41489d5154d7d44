"""What a model must be to be trained here: causal, whole, and large enough for the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from finetune.engines import refusals
from finetune.errors import SettingsError
from finetune.settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel

    from finetune.data import Tokens
    from finetune.sources.model import Source


def check_causal(source: Source) -> None:
    """Raise SettingsError if config.json describes a model that sees later tokens, as BERT does.

    In models that fill in masked words, `is_decoder` says whether they do. In others the field does not mean that: GPT-NeoX has it,
    and is a decoder. Any other model may set `is_causal`, which transformers reads when it makes the mask.
    """
    with refusals.loading(source):
        config: Any = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and hasattr(config, "is_decoder") and not config.is_encoder_decoder  # fmt: skip
    if (masked and config.is_decoder is False) or not getattr(config.get_text_config(), "is_causal", True):
        raise refusals.not_causal(source)


def check_whole(source: Source, info: Mapping[str, Any]) -> None:
    """Raise SettingsError where the files lack tensors of the model: transformers would go on with random numbers in them.

    info: what transformers says of the loading (`output_loading_info`); tied weights are not in it.
    """
    lacking = sorted(info["missing_keys"])
    odd = sorted(
        f"{name} has shape {list(found)}, not {list(wanted)}" for name, found, wanted in info["mismatched_keys"]
    )
    if lacking or odd:
        shown = [*(f"{name} is missing" for name in lacking), *odd]
        more = f" and {len(shown) - 10} more" if len(shown) > 10 else ""
        raise SettingsError(
            f"MODEL_NAME={source.name}: its files are not those of the model that its config.json describes: {', '.join(shown[:10])}{more}; "
            "download or copy the model again"
        )


def check_fits(model: PeftModel, settings: Settings, tokens: Tokens) -> None:
    """Raise SettingsError where the model has no embedding for a token or for a place in the longest row, or has biases in float16."""
    if any(p.requires_grad and p.dtype is torch.float16 and n.endswith("bias") for n, p in model.named_parameters()):
        raise SettingsError(  # GradScaler would refuse it, but only after everything is loaded
            f"LORA_BIAS={settings.lora_bias}: {settings.model_name} computes in float16 here, and biases cannot be trained in float16; "
            "set LORA_BIAS=none, or DTYPE=float32"
        )
    words: Any = model.get_input_embeddings()
    if tokens.largest >= words.num_embeddings:
        raise SettingsError(
            f"MODEL_NAME={settings.model_name}: its tokenizer makes token {tokens.largest}, and the model has {words.num_embeddings}; "
            "take the tokenizer that belongs to the model"
        )
    # names of tables of positions: learned, or computed once
    learned = ("wpe", "embed_positions", "position_embeddings", "positions_embed", "pos_encoding")
    embeddings = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    computed = [name for name, _ in model.named_buffers()]
    tables = [name for name in embeddings + computed if name.endswith(learned)]
    config: Any = model.config.get_text_config()
    # MPT makes its position biases (ALiBi) for this many positions in each pass
    biased = config.max_seq_len if getattr(getattr(config, "attn_config", None), "alibi", False) else math.inf
    limit = config.max_position_embeddings if tables else biased
    if tokens.longest > limit:
        raise SettingsError(
            f"MAX_SEQ_LENGTH={settings.max_seq_length}: a row has {tokens.longest} tokens, and {settings.model_name} knows {limit} "
            f"positions; for example MAX_SEQ_LENGTH={limit}"
        )
