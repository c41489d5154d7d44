"""Held-out rows as tokens, without near-duplicates of trained rows."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path

from finetune import files
from finetune.data import store
from finetune.data.checked import refuse
from finetune.data.encoder import Encoder
from finetune.data.formats.base import Text
from finetune.data.held_out import HeldOut, Question
from finetune.data.held_rows import Held
from finetune.data.near_duplicates import near_duplicates
from finetune.data.packing import TokenRows
from finetune.settings import Settings


def encoded(
    held: Held, encoder: Encoder, known: Callable[[list[list[int]]], list[bool]], settings: Settings
) -> HeldOut:
    """Tokens of the rows that are held out, EVAL_ROWS at the most. known: which rows are near-duplicates, given the ids of each.

    Raises SettingsError that names bad rows, where the user named these rows or would have trained them.
    """
    rows = encoder.many(held.rows)
    bad = [f"{place}: {row['problem']}" for place, row in zip(held.places, rows, strict=True) if row["problem"]]
    if held.strict:
        refuse(bad, len(bad), len(rows), settings, "what a row says has to be measured")
    # a label is an id, or below 0; the first is not counted, because no token before it predicts it
    good = [index for index, row in enumerate(rows) if any(label >= 0 for label in row["labels"][1:])]
    twice = known([rows[index]["input_ids"] for index in good]) if good else []
    free = [index for index, known in zip(good, twice, strict=True) if not known][: settings.eval_rows]
    looked_at = good.index(free[-1]) + 1 if len(free) == settings.eval_rows else len(good)
    texts = (encoder.format.text(held.rows[index]) for index in free)
    asked = itertools.islice((found for text in texts if (found := question(text))), settings.eval_questions)
    digest = hashlib.sha256()
    for ids, labels in ((rows[index]["input_ids"], rows[index]["labels"]) for index in free):
        digest.update(struct.pack(f"<q{2 * len(ids)}i", len(ids), *ids, *labels))
    return HeldOut(
        name=held.name,
        rows=[{name: rows[index][name] for name in ("input_ids", "labels")} for index in free],
        places=[held.places[index] for index in free],
        questions=list(asked),
        truncated=sum(rows[index]["truncated"] for index in free),
        dropped=held.dropped + len(rows) - len(good),
        duplicates=sum(twice[:looked_at]),
        sha256=digest.hexdigest(),
    )


def known(held: list[list[int]], trained: TokenRows, common: int, folder: Path) -> list[bool]:
    """Which of the rows are near-duplicates of trained ones. trained, common: see `Tokens`. folder: of their store, which keeps the answer."""
    name = hashlib.sha256(json.dumps([held, common]).encode()).hexdigest()
    file = folder / f"near-duplicates-{name[:32]}.json"
    with store.locked(folder):
        if file.is_file():
            return list(json.loads(file.read_bytes()))
        found = near_duplicates(held, trained.blocks(), common)
        with contextlib.suppress(PermissionError):  # another user's, who shares the cache
            files.write_json(file, found)
    return found


def question(text: Text) -> Question | None:
    """A row's training text as a question, up to its last answer; None: it holds no question, as a plain text."""
    if not text.answers:
        return None
    start, end = text.answers[-1]
    prompt = text.text[:start]
    return Question(prompt, text.text[start:end].strip()) if prompt.strip() else None
