"""`eval`: the loss of a finished run's base, adapter and merged weights on rows that were not trained, with intervals. Nothing is trained."""

from __future__ import annotations

import dataclasses
import datetime
import gc
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from finetune import console, data, files
from finetune.data import held_tokens, tokens
from finetune.data.held_out import HeldOut
from finetune.data.near_duplicates import near_duplicates
from finetune.engines import precision, refusals
from finetune.errors import MachineError, SettingsError
from finetune.machine import disk
from finetune.run import evaluation, folder, trained
from finetune.run.trained import Trained
from finetune.settings import Settings
from finetune.sources.model import Source
from finetune.training.batches import Padded
from finetune.training.evaluate import Evaluation

ROWS = 8  # measured at a time; fewer where memory runs out


def run(settings: Settings, environ: Mapping[str, str], _: str) -> None:
    """Print a sentence for the adapter and one for the merged weights, and write each row's figures into OUTPUT_DIR/eval.json.

    Raises OutputError where OUTPUT_DIR holds no whole run or no weights, SettingsError where there are no rows to measure on or the base
    is nowhere, MachineError where nothing can be written or a row does not fit the memory.
    """
    if problems := list(disk.unwritable(settings, environ)):
        raise MachineError(*problems)
    found = trained.find(settings)
    console.quiet()
    rows = _rows(found)
    print(rows.describe(), flush=True)
    losses: dict[str, list[float]] = {}
    labels: list[int] = []
    with refusals.memory_told("lower MAX_SEQ_LENGTH, for example MAX_SEQ_LENGTH=1024"):
        for name, measuring in _measurings(found, rows):
            loss = measuring.measure(0)
            if loss is None:
                raise MachineError(
                    "the held-out rows do not fit the memory; lower MAX_SEQ_LENGTH, for example MAX_SEQ_LENGTH=1024"
                )
            losses[name], labels = measuring.points.of[0], measuring.points.labels
            print(f"{name}: loss {loss:.4f}", flush=True)
            del measuring  # and with it the model, before the next one is loaded
    made = evaluation.of_run(rows, losses, labels)
    files.write_json(found.output / "eval.json", made)
    print(*(f"{name}: {each['sentence']}." for name, each in made["compared"].items()), sep="\n")
    print(f"figures of each row: {found.output / 'eval.json'}", flush=True)


def _rows(found: Trained) -> HeldOut:
    """The rows to measure on: those of EVAL_DATASET_NAME and EVAL_SPLIT, else those that the run held out."""
    settings, evaluated = found.settings, found.record.get("evaluation")
    own = settings.eval_dataset_name is None and settings.eval_split == "auto"
    if own and not evaluated:
        raise SettingsError(
            f"EVAL_DATASET_NAME: the run in OUTPUT_DIR={found.output} held no rows out, so which ones are to be measured has to be said, for "
            "example EVAL_DATASET_NAME=held-out.jsonl, or EVAL_SPLIT=train[500:564] of the data that it was trained on"
        )
    recorded = found.record["settings"]
    as_run = settings.replaced(
        eval_rows=recorded.get("EVAL_ROWS", 0),
        eval_split=recorded.get("EVAL_SPLIT", "auto"),
        eval_dataset_name=recorded.get("EVAL_DATASET_NAME"),
    )
    part = found.output / ("adapter" if (found.output / "adapter").is_dir() else "merged")
    tokenizer, day = data.tokenizer(Source(str(part), None, part)), folder.day_of(found.record)
    rows: HeldOut | None
    if not own and list(data.held_rows.missing(settings.replaced(eval_rows=0))):
        print("note: the data that was trained is not there, so near-duplicates of it are not looked for", flush=True)
        rows = _alone(settings, tokenizer, day)
    else:
        # what was trained is known by the rows that were held out then
        there = data.load(as_run)
        there = there if own else dataclasses.replace(there, held=data.held_rows.held_elsewhere(settings))
        rows = data.tokenize(there, tokenizer, as_run if own else settings, day).held_out
    if rows is None or not rows.rows:
        raise SettingsError(
            f"EVAL_ROWS: {rows.describe() if rows else 'no rows are held out with EVAL_ROWS=0, for example EVAL_ROWS=64'}"
        )
    if own and evaluated and rows.sha256 != evaluated["tokens_sha256"]:
        print(
            "note: these are not quite the rows that the run held out, since data or tokenizer have changed", flush=True
        )
    return rows


def _alone(settings: Settings, tokenizer: Any, day: datetime.date) -> HeldOut:
    """The rows of EVAL_DATASET_NAME, compared only with each other."""
    held = data.held_rows.held_elsewhere(settings)
    encoder = tokens.encoder(held.format, tokenizer, settings, day)
    return held_tokens.encoded(held, encoder, lambda rows: near_duplicates(rows, (), 0), settings)


def _measurings(found: Trained, rows: HeldOut) -> Iterator[tuple[str, Evaluation]]:
    """What measures base, adapter and merged weights, each loaded when its turn comes."""
    if found.base:
        model, tokenizer = trained.load(found, "adapter")
        measuring = _measuring(model, tokenizer, rows, found.settings)
        with model.disable_adapter():
            yield "base", measuring
        measuring.points.of.clear()
        yield "adapter", measuring
        del model, measuring
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    elif found.why_not:
        print(f"only the merged weights are measured: {found.why_not}", flush=True)
    if found.merged:
        yield "merged", _measuring(*trained.load(found, "merged"), rows, found.settings)


def _measuring(model: Any, tokenizer: Any, rows: HeldOut, settings: Settings) -> Evaluation:
    batches = Padded(model, tokenizer, precision.compute_dtype(settings), rows.rows[0])
    return Evaluation(model, batches, rows.rows, ROWS, None, max(len(row["input_ids"]) for row in rows.rows))
