"""From OUTPUT_DIR to what can answer and be measured: the adapter on its base, the merged weights, and the settings they were trained with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import sources
from finetune.data.rows import READING, TOKENIZING
from finetune.errors import HubError, OutputError, Refusal, SettingsError
from finetune.run import folder, inputs
from finetune.run.record import Record
from finetune.settings import Settings
from finetune.sources.model import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# of the run: how a row becomes tokens, and how the base is held
OF_RUN = ("load_in_4bit", "dataset_name", *(name for name in (*READING, *TOKENIZING) if not name.startswith("eval_")))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run. base: what its adapter is on; None: the adapter or its base is not there. merged: whether the merged weights are.

    settings: those given, with the run's own for its rows and its base. why_not: why the adapter has no base.
    """

    output: Path
    record: Record
    base: Source | None
    merged: bool
    settings: Settings
    why_not: str = ""


def find(settings: Settings) -> Trained:
    """The run in OUTPUT_DIR. MODEL_NAME, where it is given, says where its base is now.

    Raises OutputError where OUTPUT_DIR holds no whole run or no weights, SettingsError or HubError where all that is left is an
    adapter whose base is nowhere.
    """
    output = Path(settings.output_dir)
    record = folder.finished(output)
    adapter, merged = ((output / part).is_dir() for part in ("adapter", "merged"))
    if not adapter and not merged:
        raise OutputError(
            f"OUTPUT_DIR={output}: neither adapter nor merged weights are there; train with SAVE_ADAPTER=1"
        )
    recorded = record["settings"]
    known = {name: recorded[name.upper()] for name in OF_RUN if name.upper() in recorded}
    as_trained = settings.replaced(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()},
        dataset_revision=record["dataset"]["commit"] or settings.dataset_revision,
    )
    base, why_not = _base(record, settings, output, merged) if adapter else (None, "there is no adapter")
    return Trained(output, record, base, merged, as_trained, why_not)


def load(found: Trained, part: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model and tokenizer of a part of the run, `adapter` or `merged`. Raises OutputError where it is not as the run wrote it.

    A flipped bit would be answered from. The base has been hashed already.
    """
    from finetune.inference import load  # and with it torch

    folder.verify(found.output, f"{part}/")
    return load.load(found.output / part, found.base if part == "adapter" else None, found.settings)


def _base(record: Record, settings: Settings, output: Path, merged: bool) -> tuple[Source | None, str]:
    """The base of the recorded run, from this machine or the Hub; None, and why: it is nowhere, and the merged weights are there."""
    base, why_not = inputs.base(record, settings)
    refusal: type[Refusal] = SettingsError
    if base is None and (commit := record["model"]["commit"]):
        try:
            sources.fetch_model(settings.replaced(model_name=record["settings"]["MODEL_NAME"], model_revision=commit))
            base, why_not = inputs.base(record, settings)
        except (HubError, SettingsError) as error:
            refusal, why_not = type(error), f"{error} {why_not}"
    if base is None and not merged:
        raise refusal(f"OUTPUT_DIR={output}: {why_not}, for example MODEL_NAME=/models/base")
    return base, why_not
