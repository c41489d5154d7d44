"""An answer is greedy, whatever a model's generation_config.json asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from finetune import data
from finetune.inference import answer
from finetune.sources.model import Source


@pytest.mark.parametrize("asked", [dict(num_beams=3), dict(num_return_sequences=2, do_sample=True)])
def test_beams_and_several_sequences_are_not_made(llama: Path, asked: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    words = data.tokenizer(Source("llama", None, llama))
    plain = answer.answer(model, words, "What is it?", 4)
    model.generation_config.update(**asked)
    assert answer.answer(model, words, "What is it?", 4) == plain
    answer.answer(model, words, "What is it?", 4, show=True)  # a streamer knows no beams
