"""run.json read again, by `verify`, `ask`, `push` and `reproduce`: one reader, so that all of them refuse the same damage.

Only what they use is looked at: a record of the same version that holds more, or less of the rest, is read all the same.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import SettingsError
from finetune.run.report import SCHEMA_VERSION

# An example of each part. A value has the type of its example, and a whole number is not less than its own; every value of a
# list is like the one here, every value of an object like that under EACH; a part whose name ends in ? may be null.
EACH, SHA256 = "*", "0123456789abcdef" * 4
EXAMPLE: dict[str, Any] = {
    "settings": {
        "MODEL_NAME": "owner/name", "DATASET_NAME": "owner/name", "LOAD_IN_4BIT": True, "PROMPT_TEMPLATE?": "template.txt",
        "PROMPT_COLUMNS": ["Question"], "COMPLETION_COLUMNS": ["Response"],
    },
    "engine": {"name": "transformers"},
    "model": {"commit?": SHA256[:40], "files": {EACH: SHA256}},
    "dataset": {"commit?": SHA256[:40], "sha256": SHA256, "tokens_sha256": SHA256, "messages": False},
    "training": {
        "losses": [1.5],
        "plan": {
            "micro_batch": 1, "accumulation": 1, "recomputed": 0, "layers": 0, "reason": "as set", "forecast_gib?": 1.5,
        },
    },
    "environment": {"cpu_threads": 1, "packages": {EACH: "2.0"}, "variables": {EACH: "AVX2"}},
    "files": {EACH: {"sha256": SHA256, "bytes": 0}},
}  # fmt: skip
KINDS: Mapping[type, tuple[str, tuple[type, ...]]] = {
    str: ("a text", (str,)), bool: ("true or false", (bool,)), int: ("a whole number", (int,)), float: ("a number", (int, float)),
}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """The record in the file `path`, of this program's version and with all that is used of it.

    Raises FileNotFoundError, since what to say depends on who asked, and SettingsError with all else that is wrong.
    """
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: cannot be read as JSON ({error}); take a copy as a run wrote it") from None
    if not isinstance(record, dict) or "schema_version" not in record:
        raise SettingsError(
            f"{path}: is not the record of a run (no schema_version); a run writes it as OUTPUT_DIR/run.json"
        )
    if (version := record["schema_version"]) != SCHEMA_VERSION:
        made = record.get("environment")
        made = made if isinstance(made, dict) else {}
        raise SettingsError(
            f"{path}: has schema_version {version}, and this program reads {SCHEMA_VERSION}. Use the program that wrote it "
            f"(version {made.get('program')}, revision {made.get('revision')}), or record the run again with this one."
        )
    problems = [f"{path}: {problem}" for problem in _wrong(record, EXAMPLE)]
    if not problems:
        odd = [name for name in record["files"] if Path(name).is_absolute() or ".." in Path(name).parts]
        problems = [f"{path}: files holds {name}; it takes names below its folder" for name in odd]
    if problems:
        raise SettingsError(*problems, f"{path}: is not a whole record; take a copy as a run wrote it")
    return record


def _wrong(value: Any, example: Any, name: str = "") -> Iterator[str]:
    """What is not like `example` in `value`, the part of the record called `name`, in sentences."""
    if isinstance(example, dict) and isinstance(value, dict):
        parts = dict.fromkeys(value, example[EACH]) if EACH in example else example
        for key, like in parts.items():
            bare = key if EACH in example else key.removesuffix("?")
            if bare == key or bare not in value or value[bare] is not None:
                yield from _wrong(value.get(bare), like, f"{name}.{bare}".removeprefix("."))
    elif isinstance(example, list) and isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _wrong(inner, example[0], f"{name}[{number}]")
    elif isinstance(example, dict | list):
        yield f"{name} is {_shown(value)}; it takes {'an object' if isinstance(example, dict) else 'a list'}"
    else:
        words, types = KINDS[type(example)]
        # to Python true is a whole number too
        fits = isinstance(value, types) and isinstance(value, bool) == isinstance(example, bool)
        if isinstance(value, str):
            fits = fits and not re.search("[\0\ud800-\udfff]", value)  # which no variable and no path can hold
        elif fits:
            fits = abs(value) <= sys.float_info.max  # NaN is not
        if not fits or (type(example) is int and value < example):
            yield f"{name} is {_shown(value)}; it takes {words}, for example {json.dumps(example)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return "missing or null" if value is None else json.dumps(value)
