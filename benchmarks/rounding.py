"""What rounding to 16 bits does to the course of training: the same updates of a real small model in several ways, on a CPU.

  python3 benchmarks/rounding.py OUT.json      (two minutes; the model is that of `make smoke`)

untrained     float32 with a learning rate of 0: what there was to learn from
float32       nothing is rounded: what the others are held against
peft          bfloat16 as transformers + peft under autocast compute it: each layer's product is rounded, and its sum with
              the adapter's once more, which at first is too small to be seen after that
compiled      bfloat16 as finetune.engines.compiled computes it: on a CPU, product and adapter are summed before either is rounded
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune import data, files  # noqa: E402
from finetune.engines import adapter  # noqa: E402
from finetune.engines.compiled import attention  # noqa: E402
from finetune.engines.compiled import path as compiled  # noqa: E402
from finetune.run import provenance  # noqa: E402
from finetune.settings import Settings  # noqa: E402
from finetune.sources.model import Source  # noqa: E402

ROWS, RATES = 4, [0, 4e-5, 8e-5, 12e-5, 16e-5, *[2e-4] * 7]  # the recipe's warm-up, then its learning rate
Row = dict[str, list[int]]


def attend(q: Any, k: Any, v: Any, cu_seqlens: Any, cu_seqlens_k: Any, *_: Any, **__: Any) -> Any:
    """What torch.nn.attention.varlen computes, which has no kernel for a CPU; in float32. Keys lie as the queries do."""
    place = torch.arange(len(q))
    row = torch.searchsorted(cu_seqlens, place.to(cu_seqlens.dtype), right=True)
    seen = (row[:, None] == row[None]) & (place[:, None] >= place[None])
    dtype = q.dtype
    q, k, v = (states.transpose(0, 1).float() for states in (q, k, v))
    k, v = (states.repeat_interleave(len(q) // len(states), 0) for states in (k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).to(dtype)


def labels_of(rows: list[Row]) -> int:
    """Tokens that are predicted: all but the first of each row."""
    return sum(len(row["input_ids"]) - 1 for row in rows)


def model_of(folder: str, dtype: torch.dtype) -> Any:
    """The 16-bit model computing in `dtype`, with the recipe's adapter in float32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(dtype).requires_grad_(False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = adapter.begin(get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules=targets)), 3407)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def course(kind: str, folder: str, updates: list[list[Row]]) -> list[float]:
    """The loss of each update, trained in one of these ways."""
    exact = kind in ("untrained", "float32")
    rates = [0.0] * len(RATES) if kind == "untrained" else RATES
    model = model_of(folder, torch.float32 if exact else torch.bfloat16)
    if kind == "peft":

        def loss_of(rows: list[Row]) -> torch.Tensor:
            total = torch.zeros(())
            for row in rows:
                ids = torch.tensor([row["input_ids"]])
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(input_ids=ids).logits[0, :-1].float()
                total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            return total / labels_of(rows)

        return train(model, updates, rates, loss_of)
    with compiled.applied(model, ROWS, 160, "cpu") as packed:
        decoder = model.get_base_model().model
        if not exact:
            for layer in decoder.layers:
                layer.compile()
        return train(
            model, updates, rates, lambda rows: packed.loss(rows, torch.tensor(labels_of(rows)))
        )  # fmt: skip


def train(
    model: Any, updates: list[list[Row]], rates: list[float], loss_of: Callable[[list[Row]], torch.Tensor]
) -> list[float]:
    """AdamW in float32, gradients clipped at 1."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, weight_decay=0.01), []
    for rows, rate in zip(updates, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        loss = loss_of(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss.detach()), 5))
    return losses


def main(out: Path) -> None:
    """Train in all ways and write the losses, and their largest distance from float32's."""
    attention.varlen_attn = attend
    command = [sys.executable, str(ROOT / "scripts" / "smoke_model.py")]
    folder = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    settings = Settings.from_env({"MODEL_NAME": folder, "DATASET_NAME": "samples", "MAX_SEQ_LENGTH": "160"})
    tokens = data.tokenize(data.load(settings), data.tokenizer(Source(folder, None, Path(folder))), settings).dataset
    order = [*range(len(tokens))] * 9
    random.Random(1).shuffle(order)
    rows: list[Row] = [dict(input_ids=tokens[index]["input_ids"], labels=tokens[index]["labels"]) for index in order]
    updates = [rows[ROWS * index : ROWS * (index + 1)] for index in range(len(RATES))]
    losses = {kind: course(kind, folder, updates) for kind in ("untrained", "float32", "peft", "compiled")}
    exact = losses["float32"]
    found = dict(
        command="python3 benchmarks/rounding.py OUT.json", cpu=provenance.environment(None, {})["cpu"], versions=provenance.versions(), losses=losses,
        largest_distance_percent={
            kind: round(100 * max(abs(a - b) / b for a, b in zip(course, exact, strict=True)), 2) for kind, course in losses.items()
        },
        last_distance_percent={kind: round(100 * (course[-1] - exact[-1]) / exact[-1], 2) for kind, course in losses.items()},
    )  # fmt: skip
    files.write_json(out, found)
    print(
        json.dumps(
            {key: found[key] for key in ("losses", "largest_distance_percent", "last_distance_percent")}, indent=1
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
