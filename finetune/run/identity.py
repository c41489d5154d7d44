"""What a run is known by: all that decides its weights. Two runs with one identity are the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.run.record import OLDER, Record
from finetune.settings import declarations

MODEL_FILE, HELD_OUT = "model file ", "held-out rows"


def inputs(commit: str | None, model: Mapping[str, str], rows: str, tokens: str) -> dict[str, Any]:
    """The part that went in. model: sha256 of each file; rows, tokens: theirs."""
    return {"commit": commit, **{MODEL_FILE + name: sha for name, sha in model.items()}, "rows": rows, "tokens": tokens}


def versions(found: Mapping[str, str]) -> dict[str, Any]:
    """The part that the libraries are."""
    return {f"version of {name}": version for name, version in found.items()}


def of(record: Record) -> dict[str, Any]:
    """The identity of a recorded run. A setting that is newer than the record has its default."""
    settings, engine, model, rows = record["settings"], record["engine"], record["model"], record["dataset"]
    held_out = record.get("evaluation")
    return {
        **{
            d.name: settings.get(d.name, OLDER.get(d.name, d.default))
            for d in declarations()
            if not d.free and not d.secret
        },
        **dict(engine=engine["name"], compiled=engine["compiled"], deterministic=engine["deterministic"]),
        **inputs(model["commit"], model["files"], rows["sha256"], rows["tokens_sha256"]),
        **({"date": rows["date"]} if rows["date"] else {}),
        **({HELD_OUT: held_out["tokens_sha256"]} if held_out else {}),
        **versions(record["environment"]["packages"]),
    }
