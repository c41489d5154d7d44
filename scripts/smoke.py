#!/usr/bin/env python3
"""The whole run on a small real model: no GPU, no Hub, under 3 minutes on two cores. The environment may change any setting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SETTINGS = {
    "RUN_NAME": "SmolLM2-135M-smoke",
    "DATASET_NAME": "samples",
    "DATASET_CONFIG": "en",
    "DATASET_SPLIT": "train",
    "MAX_SEQ_LENGTH": "256",
    "PER_DEVICE_TRAIN_BATCH_SIZE": "1",
    "GRADIENT_ACCUMULATION_STEPS": "2",
    "MAX_STEPS": "12",
    "WARMUP_STEPS": "2",
    "LEARNING_RATE": "1e-3",
    "LOGGING_STEPS": "3",
    "SAVE_STEPS": "0",
    "DATASET_NUM_PROC": "1",
    "SAMPLE_QUESTION": "A 61-year-old woman with a long history of involuntary urine loss during activities like coughing or sneezing but no "
    "leakage at night undergoes a gynecological exam and Q-tip test. Based on these findings, what would cystometry most likely reveal "
    "about her residual volume and detrusor contractions?",
    "MAX_NEW_TOKENS": "60",
    "PUSH_TO_HUB": "0",
}


def main() -> None:
    given = {name for name, value in os.environ.items() if value}
    chosen = {name: value for name, value in SETTINGS.items() if name not in given}
    if "OUTPUT_DIR" not in given:
        # this folder is its own; another may hold someone's run
        chosen |= {"OUTPUT_DIR": "outputs/smoke", "OVERWRITE": "1"}
    if "MODEL_NAME" not in given:
        made = subprocess.run([sys.executable, HERE / "smoke_model.py"], stdout=subprocess.PIPE, text=True)
        if made.returncode:
            sys.exit(made.returncode)
        chosen["MODEL_NAME"] = made.stdout.strip()
    os.execve(sys.executable, [sys.executable, str(HERE.parent / "entrypoint.py"), "train"], {**os.environ, **chosen})


if __name__ == "__main__":
    main()
