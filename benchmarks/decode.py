#!/usr/bin/env python3
"""Time how answers are decoded on a GPU, and hold the tokens against the model's own logits. usage: decode.py OUT.json

Needs the standard workload (benchmarks/workload.py) in the folder WORK, default /tmp/work. Greedy, 300 prompt tokens. tokens_per_s: of
all rows, without the prompt and the capture, which are in first_s (until the first 8 tokens are there). For 100 tokens of two rows at the
most: how many are the likeliest by the logits of transformers' own forward pass in bfloat16, and how far the others lie below the
likeliest (worst_gap, beside logit_std).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.engines import precision  # noqa: E402
from finetune.inference import decode  # noqa: E402
from finetune.machine import gpus  # noqa: E402
from finetune.run import provenance  # noqa: E402

MODEL = Path(os.environ.get("WORK", "/tmp/work")) / "model"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH = 400


def main() -> None:
    """All cases, one after the other; what is done already is in OUT.json."""
    out, results = Path(sys.argv[1]), dict[str, Any]()
    torch.manual_seed(0)
    prompts = torch.randint(1000, 100_000, (8, 300)).tolist()

    def case(name: str, found: dict[str, Any]) -> None:
        results[name] = found
        print(name, found, flush=True)
        gpu = gpus.gpus(os.environ)[0]
        made = dict(
            gpu=gpu.name, driver=gpu.driver, versions=provenance.versions(), command="benchmarks/decode.py OUT.json"
        )
        out.write_text(json.dumps(dict(made, results=results), indent=1) + "\n")

    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16, device_map={"": 0}).eval()
    case("16 bits, transformers' generate", generate(plain, prompts[0]))
    for rows, folded in ((1, False), (1, True), (8, True)):
        case(f"16 bits, {'folded' if folded else 'as they lie'}, {rows} rows", timed(plain, folded, prompts[:rows]))
    del plain
    torch.cuda.empty_cache()
    base = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.bfloat16, device_map={"": 0}, quantization_config=precision.nf4(torch.bfloat16)
    )
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules=TARGETS)).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.02)
    for rows, folded in ((1, False), (1, True), (8, True)):
        case(
            f"4 bits + adapter, {'folded' if folded else 'as they lie'}, {rows} rows",
            timed(model, folded, prompts[:rows]),
        )


def timed(model: Any, folded: bool, prompts: list[list[int]]) -> dict[str, Any]:
    """Speed, memory, and how the tokens stand in the model's own logits."""
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    decoder = decode.Decoder(model, folded)
    torch.cuda.synchronize()
    made, start, marks = time.perf_counter() - began, time.perf_counter(), []
    tokens: list[list[int]] = [[] for _ in prompts]
    for some in decoder.tokens(prompts, LENGTH, [128001]):
        marks.append(time.perf_counter())
        for row, new in zip(tokens, some, strict=True):
            row += new
    between = (len(marks) - 2) * decode.EVERY * len(prompts)
    found = dict(
        tokens_per_s=round(between / (marks[-1] - marks[1]), 1),
        fold_s=round(made, 2),
        first_s=round(marks[0] - start, 2),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2),
    )
    del decoder
    torch.cuda.empty_cache()
    return {**found, **held(model, prompts[:2], tokens[:2])}


def held(model: Any, prompts: list[list[int]], tokens: list[list[int]]) -> dict[str, Any]:
    """The tokens in the logits of one forward pass over prompt and tokens."""
    same, gaps, spread = 0, [0.0], 0.0
    for prompt, new in zip(prompts, tokens, strict=True):
        chosen = torch.tensor(new[:100], device="cuda")
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=torch.tensor([prompt + new[:100]], device="cuda"), use_cache=False).logits
        logits = logits[0, len(prompt) - 1 : -1].float()
        best = logits.max(-1)
        same += int((best.indices == chosen).sum())
        gaps.append(float((best.values - logits.gather(1, chosen[:, None])[:, 0]).max()))
        spread = float(logits.std())
    return dict(likeliest=f"{same} of {100 * len(prompts)}", worst_gap=round(max(gaps), 3), logit_std=round(spread, 3))


def generate(model: Any, prompt: list[int]) -> dict[str, Any]:
    """transformers' own way."""
    ids = torch.tensor([prompt], device="cuda")
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=4, **options)
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=64, min_new_tokens=64, **options)
        torch.cuda.synchronize()
    return dict(tokens_per_s=round(64 / (time.perf_counter() - began), 1))


if __name__ == "__main__":
    main()
