"""Greedy answers, in training and from a finished run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.engines.engine import Engine


def sample(
    engine: Engine, model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, settings: Settings
) -> Callable[[str], str]:
    """A function that gives `model` the prompt, and says whether before or after training; "" where nothing is asked."""

    def ask(when: str) -> str:
        if not settings.max_new_tokens:
            return ""
        console.phase("asking", f"asking the sample question {when} training")
        with engine.answering(model):
            return answer(model, tokenizer, prompt, settings.max_new_tokens)

    return ask


def answer(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int, show: bool = False) -> str:
    """The model's greedy continuation of `prompt`, at most `limit` new tokens, without special tokens.

    show: print it as it comes.
    """
    import torch
    from transformers import TextStreamer

    begun = bool(tokenizer.bos_token) and prompt.startswith(str(tokenizer.bos_token))
    inputs = tokenizer(prompt, add_special_tokens=not begun, return_tensors="pt").to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    autocast: Any = nullcontext()
    if model.device.type == "cuda" and _dtype(model) is not torch.float32:
        autocast = torch.autocast("cuda", _dtype(model))  # the adapter is float32, the base is not
    ends = {tokenizer.eos_token_id, *_ids(getattr(model.generation_config, "eos_token_id", None))}
    with torch.inference_mode(), autocast:
        produced = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends),
            streamer=streamer,
        )
    new = produced[0, inputs["input_ids"].shape[1] :]
    opened = "<think>" if prompt.endswith("<think>") else ""
    return opened + str(tokenizer.decode(new, skip_special_tokens=True))


def _dtype(model: Any) -> Any:
    """The floating type of the model's embedding, which is the base's."""
    return model.get_input_embeddings().weight.dtype


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
