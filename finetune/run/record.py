"""run.json, described once: what a run writes, what is read again, and `finetune/run.schema.json` all come from `Record`.

A section may gain entries, such as another measurement. Where extra entries are forbidden, the section decides the result.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, get_args, get_origin

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from finetune import files
from finetune.data.formats import FORMATS
from finetune.errors import Refusal
from finetune.settings import Declaration, declarations

SCHEMA_VERSION = 3  # to be raised with each change that an older reader would get wrong
# settings that every record has; for a setting newer than the record, the default is meant
NEEDED = (
    *("MODEL_NAME", "DATASET_NAME", "DATASET_SPLIT", "PROMPT_TEMPLATE", "PROMPT_COLUMNS", "COMPLETION_COLUMNS"),
    *("LOAD_IN_4BIT", "MAX_STEPS", "SEED", "OUTPUT_DIR"),
)
# what a record means that is older than the setting, where that is not the default: no row was held out then
OLDER = {"EVAL_ROWS": 0}

CLOSED = ConfigDict(extra="forbid")
PART = r"(\.?[^/.\x00][^/\x00]*|\.\.[^/\x00]+|\.)"  # of a path, but for ..

Line = Annotated[str, Field(pattern=r"^[^\x00]*$")]  # no variable and no path can hold a NUL
Text = Annotated[str, Field(pattern=r"^[^\x00]+$", examples=["text"])]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$", examples=["0123456789abcdef" * 4])]
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$", examples=["0123456789" * 4])]
Count = Annotated[int, Field(ge=0, examples=[0])]
Positive = Annotated[int, Field(ge=1, examples=[1])]
Amount = Annotated[FiniteFloat, Field(ge=0, examples=[1.5])]
Variable = Annotated[str, Field(pattern="^[A-Z][A-Z0-9_]*$")]
FileName = Annotated[str, Field(pattern=f"^{PART}(/{PART})*$")]


def _json_type(declared: Declaration) -> Any:
    """The type that a setting's value has in JSON."""
    kind = declared.kind
    kind = list[Line] if get_origin(kind) is tuple else Line if kind is str else FiniteFloat if kind is float else kind
    found = kind | Literal["auto"] if declared.planned else kind
    return found | None if type(None) in get_args(declared.type) else found


if TYPE_CHECKING:
    Values = dict[str, Any]
else:
    Values = TypedDict(
        "Values",
        {
            d.name: _json_type(d) if d.name in NEEDED else NotRequired[_json_type(d)]
            for d in declarations()
            if not d.secret
        },
    )
    Values.__pydantic_config__ = CLOSED
    Values.__doc__ = "Every setting but the secrets, under its name. finetune/settings.py declares their ranges."


class Engine(TypedDict):
    name: Literal["unsloth", "transformers"]
    reason: Text
    compiled: bool
    deterministic: bool


@with_config(CLOSED)
class Model(TypedDict):
    """What was trained on and merged into. files: sha256 of weights, configuration and tokenizer."""

    name: Text
    commit: Annotated[Commit | None, Field(description="Of the Hub's repository; null: a local folder.")]
    files: Annotated[dict[FileName, Sha256], Field(min_length=2, json_schema_extra={"additionalProperties": False})]


@with_config(CLOSED)
class Dataset(TypedDict):
    """sha256: of the rows as used. tokens_sha256: of the ids and labels made of them. common: length of the prefix that all rows share."""

    name: Text
    commit: Annotated[Commit | None, Field(description="Of the Hub's repository; null: local or bundled rows.")]
    format: Annotated[
        str, Field(pattern=f"^({'|'.join(FORMATS)})$", examples=["columns"], description="The form of the rows.")
    ]
    seen: Positive
    dropped: Count
    trained: Positive
    truncated: Count
    longest: Positive
    common: Count
    tokens: Positive
    tokens_trained: Annotated[Positive, Field(description="Tokens that the loss is on.")]
    date: Annotated[
        Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$", examples=["2026-01-31"])] | None,
        Field(description="What the chat template wrote as today's date; null: it writes none."),
    ]
    sha256: Sha256
    tokens_sha256: Sha256


class Plan(TypedDict):
    """How an update is computed."""

    micro_batch: Positive
    accumulation: Positive
    recomputed: Count
    layers: Count
    reason: Text
    embedding_on_host: bool
    dequantized: bool
    forecast_gib: Amount | None


class Training(TypedDict):
    """losses: one for each update. step_s: median seconds of an update."""

    steps: Positive
    epoch: Amount
    losses: Annotated[list[FiniteFloat], Field(min_length=1)]
    plan: Plan
    step_s: Amount
    tokens: Positive
    tokens_per_s: Amount
    resumed_from: Positive | None


class Memory(TypedDict):
    """Peaks in GiB."""

    training_gib: Amount
    process_gib: Amount


class Verification(TypedDict):
    """What verification found in the merged weights, counted in tensors; null: there are none.

    changed: as the adapter says. rounded_away: targets whose change was too small for 16 bits. unreached: targets for which nothing was
    learned; unreached_first: one of them. kept: equal to the base's. rounded: equal to the base's, rounded to bfloat16.
    """

    changed: Count
    rounded_away: Count
    unreached: Count
    unreached_first: Text | None
    kept: Count
    rounded: Count


class Answered(TypedDict):
    """A held-out row's question; reference: the row's own answer."""

    question: str
    reference: str
    before: str
    after: str


class Samples(TypedDict):
    """row: the first row as it is trained, the trained part between ‹ and ›, cut in its middle where it is long.

    held_out: questions of held-out rows. Records from before there was an evaluation lack it.
    """

    question: Line
    before: str
    after: str
    row: NotRequired[str]
    held_out: NotRequired[list[Answered]]


class Interval(TypedDict):
    """Mean loss of a label; low, high: the 95 % interval of a bootstrap over rows."""

    loss: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class Loss(Interval):
    perplexity: Amount


class Point(TypedDict):
    step: Count
    loss: FiniteFloat


class Measured(TypedDict):
    """A held-out row. before, after: summed loss of its labels."""

    row: Text
    labels: Count
    before: FiniteFloat
    after: FiniteFloat


class Evaluation(TypedDict):
    """Losses on held-out rows; null: none were measured.

    name: of their data set. labels: tokens that the losses are of. truncated: rows longer than MAX_SEQ_LENGTH; cut: longer than any
    trained row. dropped, duplicates: rows left out, because they are malformed, or near-duplicates of trained rows. change: of the loss,
    in pairs. kept: the update whose adapter was kept; best: whether for its loss. course: at step 0 it is the base's.
    """

    name: Text
    tokens_sha256: Sha256
    rows: Positive
    labels: Positive
    truncated: Count
    cut: Count
    dropped: Count
    duplicates: Count
    before: Loss
    after: Loss
    change: Interval
    sentence: Text
    kept: Positive
    best: bool
    course: list[Point]
    each: list[Measured]


class Environment(TypedDict):
    """Machine and program. variables: those set that change numbers. revision: commit of the program; null: unknown."""

    program: Text
    revision: Text | None
    dirty: bool
    image: bool
    lock_sha256: Sha256 | None
    python: Annotated[str, Field(pattern=r"^3\.[0-9]+\.[0-9]+", examples=["3.12.1"])]
    platform: Text
    packages: dict[str, Text]
    gpu: Text | None
    gpu_capability: Text | None
    driver: Text | None
    cuda: Text | None
    cpu: Text | None
    cpu_threads: Positive
    cpu_capability: Text
    variables: Annotated[dict[Variable, Line], Field(json_schema_extra={"additionalProperties": False})]


class Timings(TypedDict):
    """Seconds of each part of the run."""

    total_s: Amount


@with_config(CLOSED)
class Entry(TypedDict):
    sha256: Sha256
    bytes: Count


PAGES = ("README.md", "curves.png", "metrics.jsonl", "report.html", "samples.md")


class Record(TypedDict):
    """The record of one run."""

    schema_version: Literal[3]
    settings: Values
    engine: Engine
    model: Model
    dataset: Dataset
    training: Training
    memory: Memory
    verification: Verification | None
    evaluation: NotRequired[Evaluation | None]
    samples: Samples
    environment: Environment
    timings: Timings
    files: Annotated[
        dict[FileName, Entry],
        Field(
            description="Every file of the run below OUTPUT_DIR but run.json and the checkpoints.",
            json_schema_extra={"additionalProperties": False, "required": list(PAGES)},
        ),
    ]


@functools.cache
def _adapter() -> TypeAdapter[Record]:
    return TypeAdapter(Record)


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON schema of run.json."""
    found = dict(_untitled(_adapter().json_schema()))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "run.json of the fine-tuning image",
        **found,
        "additionalProperties": {"type": "object"},
    }


def _untitled(part: Any) -> Any:
    """Without the titles that pydantic makes of the names."""
    if isinstance(part, list):
        return [_untitled(inner) for inner in part]
    if isinstance(part, dict):
        return {key: _untitled(inner) for key, inner in part.items() if key != "title" or not isinstance(inner, str)}
    return part


def problems(record: Any) -> list[str]:
    """What is wrong with a record, in sentences."""
    try:
        _adapter().validate_python(record, strict=True)
    except ValidationError as error:
        return list(dict.fromkeys(_sentence(dict(found)) for found in error.errors(include_url=False)))
    return []


def _sentence(error: Mapping[str, Any]) -> str:
    """What pydantic found, with what is allowed and an example, both from the schema."""
    *outer, last = error["loc"] or ("",)
    if last == "[key]":
        name, key = _place(outer[:-1])[0], outer[-1]
        allowed = "names below its folder" if name in ("files", "model.files") else "names such as MKL_CBWR"
        return f"{name} holds {_json(key)[1:-1]}; it takes {allowed}"
    name, part = _place(error["loc"])
    if error["type"] == "extra_forbidden":
        why = (
            "the settings of this program but its secrets, which are given in the environment, for example HF_TOKEN"
            if name == "settings"
            else "no such entry"
        )
        return f"{name} holds {last}; it takes {why}"
    was = "is missing" if error["type"] == "missing" else f"is {_json(error['input'])}"
    return f"{name} {was}; it takes {_allowed(part)}"


def _place(loc: Any) -> tuple[str, dict[str, Any]]:
    """The name of a part of the record, and its schema. What pydantic adds for the branches of a union is left out."""
    name, part = "", schema()
    for step in loc:
        if part.get("type") == "array":
            name, part = f"{name}[{step}]", _resolved(part.get("items", {}))
            continue
        inner = part.get("properties", {}).get(step) or next(iter(part.get("patternProperties", {}).values()), None)
        if inner is None and isinstance(part.get("additionalProperties"), dict) and part is not schema():
            inner = part["additionalProperties"]
        if inner is None:
            break
        name, part = f"{name}.{step}".removeprefix("."), _resolved(inner)
    return name, part


def _resolved(part: dict[str, Any]) -> dict[str, Any]:
    """Behind a reference, and without the null that may stand in its place."""
    if "$ref" in part:
        return _resolved(schema()["$defs"][part["$ref"].rpartition("/")[2]])
    others = [option for option in part.get("anyOf", ()) if option.get("type") != "null"]
    return _resolved(others[0]) if len(others) == 1 else part


KINDS = {
    "object": "an object",
    "array": "a list",
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
}


def _allowed(part: Mapping[str, Any]) -> str:
    """What a part takes, in words, with an example."""
    if "anyOf" in part:
        return " or ".join(_allowed(option) for option in part["anyOf"])
    if choices := part.get("enum") or ([part["const"]] if "const" in part else []):
        return " or ".join(map(_json, choices))
    least = f" of at least {part['minimum']}" if "minimum" in part else ""
    example = f", for example {_json(part['examples'][0])}" if "examples" in part else ""
    return f"{KINDS.get(part.get('type', ''), 'another value')}{least}{example}"


def _json(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    written = json.dumps(value)
    return written if len(written) <= 100 else f"{written[:100]} …"


def read(path: Path, refusal: type[Refusal]) -> Record:
    """The record in the file `path`. Every reader refuses the same damage.

    Raises FileNotFoundError, since what to say depends on who asked, and `refusal` with all that is wrong.
    """
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):  # a file was named where a folder is meant
        raise FileNotFoundError(path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(f"{path}: cannot be read as JSON ({error}); take a copy as a run wrote it") from None
    if not isinstance(record, dict) or "schema_version" not in record:
        raise refusal(f"{path}: is not the record of a run (no schema_version); a run writes it as OUTPUT_DIR/run.json")
    if (version := record["schema_version"]) != SCHEMA_VERSION:
        made = record.get("environment")
        made = made if isinstance(made, dict) else {}
        raise refusal(
            f"{path}: has schema_version {_json(version)}, and this program reads {SCHEMA_VERSION}. Use the program that wrote "
            f"it (version {made.get('program')}, revision {made.get('revision')}), or record the run again with this one."
        )
    if wrong := problems(record):
        raise refusal(
            *(f"{path}: {problem}" for problem in wrong),
            f"{path}: is not a whole record; take a copy as a run wrote it",
        )
    return record  # type: ignore[return-value]  # as `problems` has found


def made(**parts: Any) -> Record:
    """A new record. Raises ValueError where no reader would take it, which is a bug."""
    if wrong := problems(parts):
        raise ValueError(f"run.json: {'; '.join(wrong)}")
    return parts  # type: ignore[return-value]  # as `problems` has found


def entries(output: Path, names: list[str], known: Mapping[str, str]) -> dict[str, Entry]:
    """What run.json says of files, under their names. known: sha256 of some."""
    found = {**known, **files.digests(output, [name for name in names if name not in known])}
    return {name: Entry(sha256=found[name], bytes=(output / name).stat().st_size) for name in sorted(names)}


def below(output: Path) -> list[str]:
    """Names of all files in `output`/adapter and `output`/merged, relative to `output`."""
    return [f"{folder}/{name}" for folder in ("adapter", "merged") for name in files.below(output / folder)]


def weights(record: Record) -> dict[str, str]:
    """sha256 of each file of adapter or merged weights."""
    names = (n for n in record["files"] if n.startswith(("adapter/", "merged/")) and n.endswith(".safetensors"))
    return {name: record["files"][name]["sha256"] for name in names}


def shown(value: Any) -> str:
    """A recorded value in a table."""
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def same(kept: int, rounded: int) -> str:
    """What is said of merged tensors without a target. rounded: those that were wider than 16 bits in the base."""
    return f"{kept} are the base's" + (f", {rounded} are the base's rounded to bfloat16" if rounded else "")
