"""Decoding by hand on a GPU in bfloat16: its logits and its tokens are transformers' own, within what bfloat16 rounds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.inference import decode
from unit.test_decode import KINDS, PROMPTS, decoded, model

ROUNDINGS = 2  # two ways to compute in bfloat16 lie at most so many roundings apart, each measured against float32


@pytest.fixture
def device() -> str:
    return "cuda"


def logits(loaded: Any, row: list[int]) -> torch.Tensor:
    """(tokens, words), by transformers."""
    with torch.inference_mode():
        found: torch.Tensor = loaded(input_ids=torch.tensor([row], device=loaded.device), use_cache=False).logits[0]
    return found.float()


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_tokens_are_those_of_transformers(tmp_path: Path, kind: str, folded: bool, device: str) -> None:
    loaded = model(tmp_path, kind, initializer_range=0.1).to(torch.bfloat16).to(device)
    exact = copy.deepcopy(loaded).float()
    decoder = decode.Decoder(loaded, folded)
    wanted = {tuple(row): (logits(exact, row), logits(loaded, row)) for row in PROMPTS}
    rounding = max(float((rounded - true).abs().max()) for true, rounded in wanted.values())

    seen: list[torch.Tensor] = []
    hook = decoder.base.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.float()))
    first = [row[0] for row in next(iter(decoder.tokens(PROMPTS, 1, [0])))]
    hook.remove()
    for row, found in zip(PROMPTS, seen[0], strict=True):
        assert (found - wanted[tuple(row)][0][-1]).abs().max() <= ROUNDINGS * rounding
    assert seen[0].argmax(-1).tolist() == first

    for prompt, new in zip(PROMPTS, decoded(decoder, PROMPTS, [0]), strict=True):
        along = logits(exact, [*prompt, *new])[len(prompt) - 1 : -1]
        chosen = along.gather(1, torch.tensor(new, device=device)[:, None])[:, 0]
        assert (along.max(-1).values - chosen).max() <= 2 * ROUNDINGS * rounding  # where they part, both are as likely
    assert 0 < rounding < 0.1 * float(wanted[tuple(PROMPTS[1])][0].std())
