"""Three updates of four rows on a tiny model, by the real trainer in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from finetune import data
from finetune.engines import plain as engine
from finetune.engines.choose import Choice, choose
from finetune.settings import Settings
from finetune.sources.model import Source
from finetune.training import fit as train


def fit(
    llama: Path, output: Path, choice: Choice | None = None, **values: Any
) -> tuple[train.Fit, dict[str, torch.Tensor]]:
    """What training did, and the adapter it ended with. choice: else the one for a machine without GPU."""
    settings = Settings.from_env(
        {
            "MODEL_NAME": str(llama), "DATASET_NAME": "samples", "DATASET_CONFIG": "en", "MAX_STEPS": "3", "WARMUP_STEPS": "0",
            "PER_DEVICE_TRAIN_BATCH_SIZE": "4", "GRADIENT_ACCUMULATION_STEPS": "1", "MAX_SEQ_LENGTH": "288", "LEARNING_RATE": "1e-2",
            "LOAD_IN_4BIT": "0", "OPTIM": "adamw_torch", "SAVE_STEPS": "0", **values,
        }
    )  # fmt: skip
    source = Source(str(llama), None, llama)
    tokenizer = data.tokenizer(source)
    tokens = data.tokenize(data.load(settings), tokenizer, settings)
    assert tokens.common < tokens.longest  # rows that differ
    model = engine.load(settings, source)
    done = train.fit(model, tokens, tokenizer, settings, choice or choose(settings, None, {}), engine, output)
    return done, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
