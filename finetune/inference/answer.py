"""Greedy answers, in training and from a finished run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from finetune import console
from finetune.inference import decode
from finetune.machine import memory
from finetune.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.engines.engine import Engine

FOLDING = 1.1  # times the bytes of folded weights that have to be free: a layer's parts exist twice for a moment


def sample(
    engine: Engine, model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], settings: Settings
) -> Callable[[str], list[str]]:
    """A function that gives `model` the prompts, and says whether before or after training. [] where nothing is asked.

    The first prompt is always answered, the others on a GPU, where they take hardly more time than one.
    """

    def ask(when: str) -> list[str]:
        if not settings.max_new_tokens:
            return []
        fast = model.device.type == "cuda" and decode.unserved(model) is None
        asked = prompts if fast else prompts[:1]
        others = f" and {len(asked) - 1} held-out ones" if asked[1:] else ""
        if prompts[1:] and not fast and when == "before":
            print("held-out questions are not asked: they need the fast decoder, on a GPU", flush=True)
        began = time.monotonic()
        with console.stage("asking", f"asking the sample question{others} {when} training"), engine.answering(model):
            found, count = _all(model, tokenizer, asked, settings, beside=when == "after" and settings.save_merged)
        print(f"answered: {count} tokens, {count / max(time.monotonic() - began, 0.001):.0f} a second", flush=True)
        return found

    return ask


def _all(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], settings: Settings, beside: bool
) -> tuple[list[str], int]:
    """The answers at once; where that does not fit the memory, the first alone. beside: the weights are merged meanwhile."""
    try:
        return answers(model, tokenizer, prompts, settings.max_new_tokens, settings.max_memory, beside=beside)
    except torch.OutOfMemoryError:
        if len(prompts) == 1:
            raise
    torch.cuda.empty_cache()
    print("out of GPU memory: only the sample question is asked", flush=True)
    return answers(model, tokenizer, prompts[:1], settings.max_new_tokens, settings.max_memory, beside=beside)


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int, max_memory: float | None = None, show: bool = False
) -> tuple[str, int]:  # fmt: skip
    """As `answers`, for one prompt. show: print it as it comes."""
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    (found,), count = answers(model, tokenizer, [prompt], limit, max_memory, streamer)
    return found, count


def answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], limit: int, max_memory: float | None = None,
    streamer: TextStreamer | None = None, beside: bool = False,
) -> tuple[list[str], int]:  # fmt: skip
    """The model's greedy continuation of each prompt without special tokens, and how many tokens they have: at most `limit` each.

    By hand on a GPU for the architectures that are known (`decode`), else by transformers' generate, one after the other. max_memory:
    GiB of GPU memory to keep within; None: what is free. beside: another thread uses the GPU meanwhile.
    """
    ids = [_ids_of(prompt, tokenizer) for prompt in prompts]
    ends = sorted({tokenizer.eos_token_id, *_ids(getattr(model.generation_config, "eos_token_id", None))})
    why = decode.unserved(model) if model.device.type == "cuda" else ""
    if why:
        print(f"answering by transformers' generate, which is slower: {why}", flush=True)
    if why is None:
        needed = FOLDING * decode.folded_bytes(model) + decode.cache_bytes(model, ids, limit)
        folded = needed < memory.of_gpu(max_memory) - torch.cuda.memory_allocated()
        new = _decoded(decode.Decoder(model, folded).tokens(ids, limit, ends, beside), ids, streamer)
        torch.cuda.empty_cache()
    else:
        new = [_generated(model, tokenizer, row, limit, ends, streamer) for row in ids]
    opened = ["<think>" if prompt.endswith("<think>") else "" for prompt in prompts]
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in new]
    return [begin + text for begin, text in zip(opened, texts, strict=True)], sum(map(len, new))


def _ids_of(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    begun = bool(tokenizer.bos_token) and prompt.startswith(str(tokenizer.bos_token))
    return list(tokenizer(prompt, add_special_tokens=not begun)["input_ids"])


def _decoded(coming: Iterator[list[list[int]]], ids: list[list[int]], streamer: TextStreamer | None) -> list[list[int]]:
    """All tokens of each row. coming: a few of each at a time. streamer: for one prompt alone."""
    new: list[list[int]] = [[] for _ in ids]
    if streamer:
        streamer.put(torch.tensor(ids))
    for some in coming:
        for row, tokens in zip(new, some, strict=True):
            row += tokens
        if streamer:
            for token in some[0]:
                streamer.put(torch.tensor([token]))
    if streamer:
        streamer.end()
    return new


def _generated(
    model: Any, tokenizer: PreTrainedTokenizerBase, row: list[int], limit: int, ends: list[int], streamer: TextStreamer | None
) -> list[int]:  # fmt: skip
    ids = torch.tensor([row], device=model.device)
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


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
