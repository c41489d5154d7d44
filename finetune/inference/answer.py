"""Greedy answers, in training and from a finished run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from finetune import console
from finetune.inference import decode
from finetune.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.engines.engine import Engine

GIB = 2**30
FOLDING = 1.1  # times the bytes of folded weights that have to be free: a layer's parts exist twice for a moment


def sample(
    engine: Engine, model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, settings: Settings
) -> Callable[[str], str]:
    """A function that gives `model` the prompt, and says whether before or after training; "" where nothing is asked."""

    def ask(when: str) -> str:
        if not settings.max_new_tokens:
            return ""
        began = time.monotonic()
        with console.stage("asking", f"asking the sample question {when} training"), engine.answering(model):
            text, count = answer(model, tokenizer, prompt, settings.max_new_tokens, settings.max_memory)
        print(f"answered: {count} tokens, {count / max(time.monotonic() - began, 0.001):.0f} a second", flush=True)
        return text

    return ask


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int, max_memory: float | None = None, show: bool = False
) -> tuple[str, int]:  # fmt: skip
    """The model's greedy continuation of `prompt` without special tokens, and how many tokens it has: at most `limit`.

    By hand on a GPU for the architectures that are known (`decode`), else by transformers' generate. max_memory: GiB of GPU memory to
    keep within; None: what is free. show: print it as it comes.
    """
    begun = bool(tokenizer.bos_token) and prompt.startswith(str(tokenizer.bos_token))
    ids = tokenizer(prompt, add_special_tokens=not begun, return_tensors="pt")["input_ids"].to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    ends = sorted({tokenizer.eos_token_id, *_ids(getattr(model.generation_config, "eos_token_id", None))})
    why = decode.unserved(model) if model.device.type == "cuda" else ""
    if why:
        print(f"answering by transformers' generate, which is slower: {why}", flush=True)
    if why is None:
        folded = FOLDING * decode.folded_bytes(model) < _room(max_memory)
        new = _decoded(decode.Decoder(model, folded), ids, limit, ends, streamer)
        torch.cuda.empty_cache()
    else:
        new = _generated(model, tokenizer, ids, limit, ends, streamer)
    opened = "<think>" if prompt.endswith("<think>") else ""
    return opened + str(tokenizer.decode(new, skip_special_tokens=True)), len(new)


def _decoded(
    decoder: decode.Decoder, ids: Any, limit: int, ends: list[int], streamer: TextStreamer | None
) -> list[int]:
    new: list[int] = []
    if streamer:
        streamer.put(ids.cpu())
    for (some,) in decoder.tokens(ids.tolist(), limit, ends):
        new += some
        if streamer:
            for token in some:
                streamer.put(torch.tensor([token]))
    if streamer:
        streamer.end()
    return new


def _generated(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: Any, limit: int, ends: list[int], streamer: TextStreamer | None
) -> list[int]:  # fmt: skip
    with torch.inference_mode(), _autocast(model):
        produced = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
            streamer=streamer,
        )
    return list(produced[0, ids.shape[1] :].tolist())


def _autocast(model: Any) -> Any:
    """The adapter is float32, the base is not."""
    dtype = model.get_input_embeddings().weight.dtype
    lower = model.device.type == "cuda" and dtype is not torch.float32
    return torch.autocast("cuda", dtype) if lower else nullcontext()


def _room(max_memory: float | None) -> float:
    """Bytes of GPU memory that may still be taken."""
    free, _ = torch.cuda.mem_get_info()
    limit = float(free + torch.cuda.memory_reserved())
    return min(limit, max_memory * GIB if max_memory else limit) - torch.cuda.memory_allocated()


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
