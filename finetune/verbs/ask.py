"""`ask`: the trained model's answer, from the adapter on its base (in 4 bits if trained so), otherwise from the merged weights."""

from __future__ import annotations

from collections.abc import Mapping

from finetune import console, data
from finetune.engines import refusals
from finetune.inference import answer
from finetune.run import folder, trained
from finetune.settings import Settings


def run(settings: Settings, environ: Mapping[str, str], question: str) -> None:
    """Print the answer. MODEL_NAME, where it is given, says where the base is now.

    Raises OutputError where OUTPUT_DIR holds no whole run or no weights, SettingsError where the base is nowhere.
    """
    found = trained.find(settings)
    console.quiet()
    if found.base is None and (found.output / "adapter").is_dir():
        print(f"the merged weights answer, since the adapter lacks its base: {found.why_not}", flush=True)
    part = "adapter" if found.base else "merged"
    model, tokenizer = trained.load(found, part)
    form = data.format_of(found.record["dataset"]["format"], tokenizer, found.settings, folder.day_of(found.record))
    length = settings.max_new_tokens or Settings.max_new_tokens  # 0 asked for no answer in training
    with refusals.memory_told("ask for fewer tokens, for example MAX_NEW_TOKENS=200"):
        answer.answer(model, tokenizer, form.prompt(question), length, show=True)
