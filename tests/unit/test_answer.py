"""An answer is greedy, whatever a model's generation_config.json asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune import data
from finetune.inference import answer, decode
from finetune.settings import Settings
from finetune.sources.model import Source


@pytest.mark.parametrize("asked", [dict(num_beams=3), dict(num_return_sequences=2, do_sample=True)])
def test_beams_and_several_sequences_are_not_made(llama: Path, asked: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    words = data.tokenizer(Source("llama", None, llama))
    plain = answer.answer(model, words, "What is it?", 4)
    model.generation_config.update(**asked)
    assert answer.answer(model, words, "What is it?", 4) == plain
    answer.answer(model, words, "What is it?", 4, show=True)  # a streamer knows no beams


def test_several_prompts_are_answered_as_each_alone(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    words = data.tokenizer(Source("llama", None, llama))
    prompts = ["What is it?", "Why does a raised troponin mean that?<think>", "When?"]
    alone = [answer.answer(model, words, prompt, 12) for prompt in prompts]
    texts, count = answer.answers(model, words, prompts, 12)
    assert texts == [text for text, _ in alone] and count == sum(count for _, count in alone)
    ids = [answer._ids_of(prompt, words) for prompt in prompts]
    decoded = answer._decoded(decode.Decoder(model, False).tokens(ids, 12, [words.eos_token_id]), ids, None)
    assert [words.decode(row, skip_special_tokens=True) for row in decoded] == [
        text.removeprefix("<think>") for text in texts
    ]


def test_where_memory_runs_out_the_sample_question_alone_is_asked(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def answers(model: Any, tokenizer: Any, prompts: list[str], *_: Any, beside: bool) -> tuple[list[str], int]:
        asked.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ["a"], 1

    monkeypatch.setattr(answer, "answers", answers)
    assert answer._all(None, None, ["one", "two"], Settings(), beside=False) == (["a"], 1) and asked == [2, 1]
    assert "only the sample question" in capsys.readouterr().out
