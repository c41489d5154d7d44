"""`ask`: the trained model's answer, from the adapter on its base (in 4 bits if trained so), otherwise from the merged weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune import console, data, sources
from finetune.engines import refusals
from finetune.errors import HubError, OutputError, Refusal, SettingsError
from finetune.inference import answer, load
from finetune.run import folder, inputs
from finetune.run.record import Record
from finetune.settings import Settings
from finetune.sources.model import Source


def run(settings: Settings, environ: Mapping[str, str], question: str) -> None:
    """Print the answer. MODEL_NAME, where it is given, says where the base is now.

    Raises OutputError where OUTPUT_DIR holds no whole run or no weights, SettingsError where the base is nowhere.
    """
    output = Path(settings.output_dir)
    record = folder.finished(output)
    console.quiet()
    there = [output / part for part in ("adapter", "merged") if (output / part).is_dir()]
    if not there:
        raise OutputError(
            f"OUTPUT_DIR={output}: neither adapter nor merged weights are there; train with SAVE_ADAPTER=1"
        )
    base = _base(record, settings, output) if there[0] == output / "adapter" else None
    # a flipped bit would be answered from; the base has been hashed already
    folder.verify(output, "adapter/" if base else "merged/")
    recorded = record["settings"]
    as_trained = settings.replaced(
        load_in_4bit=recorded["LOAD_IN_4BIT"],
        prompt_template=recorded["PROMPT_TEMPLATE"],
        prompt_columns=tuple(recorded["PROMPT_COLUMNS"]),
        completion_columns=tuple(recorded["COMPLETION_COLUMNS"]),
    )
    model, tokenizer = load.load(there[0] if base else output / "merged", base, as_trained)
    form = data.format_of(record["dataset"]["format"], tokenizer, as_trained, folder.day_of(record))
    length = settings.max_new_tokens or Settings.max_new_tokens  # 0 asked for no answer in training
    with refusals.memory_told("ask for fewer tokens, for example MAX_NEW_TOKENS=200"):
        answer.answer(model, tokenizer, form.prompt(question), length, show=True)


def _base(record: Record, settings: Settings, output: Path) -> Source | None:
    """The base of the recorded run, from this machine or the Hub; None: it is nowhere, and the merged weights are there.

    Raises SettingsError where they are not.
    """
    base, why_not = inputs.base(record, settings)
    refusal: type[Refusal] = SettingsError
    if base is None and (commit := record["model"]["commit"]):
        try:
            sources.fetch_model(settings.replaced(model_name=record["settings"]["MODEL_NAME"], model_revision=commit))
            base, why_not = inputs.base(record, settings)
        except (HubError, SettingsError) as error:
            refusal, why_not = type(error), f"{error} {why_not}"
    if base is None and not (output / "merged").is_dir():
        raise refusal(f"OUTPUT_DIR={output}: {why_not}, for example MODEL_NAME=/models/base")
    if base is None:
        print(f"the merged weights answer, since the adapter lacks its base: {why_not}", flush=True)
    return base
