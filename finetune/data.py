"""Rows -> training text -> tokens: where the rows come from, what is refused, and what the loss is on."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import hub
from finetune.errors import HubError, SettingsError
from finetune.settings import SPLIT, Settings

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

TEMPLATE = """Below is an instruction that describes a task, paired with an input that provides further context.
Write a response that appropriately completes the request.
Before answering, think carefully about the question and create a step-by-step chain of thoughts to ensure a logical and accurate response.
### Instruction:
You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment planning.
Please answer the following medical question.
### Question:
{}
### Response:
<think>
{}
</think>
{}"""
FEW_ROWS = 1000  # that one process tokenizes before others have started: 500 take 0.6 s in one, 1.9 s in two
SHOWN = 5  # bad rows named in one message
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
IGNORED = -100  # label that the loss leaves out
COMMIT = "[0-9a-f]{40}"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that passed the checks. sha256: of their texts in order, so that equal data is known as equal."""

    name: str
    commit: str | None
    rows: list[Row]
    messages: bool
    seen: int
    dropped: int
    sha256: str

    def record(self) -> dict[str, Any]:
        """What run.json says of the data."""
        return dict(
            name=self.name,
            commit=self.commit,
            messages=self.messages,
            seen=self.seen,
            dropped=self.dropped,
            sha256=self.sha256,
        )


def on_hub(name: str) -> bool:
    """Whether DATASET_NAME is looked for on the Hub: it is neither the bundled rows nor a file."""
    return name != "samples" and not name.lower().endswith(SUFFIXES) and not name.startswith((".", "/", "~"))


def load(settings: Settings) -> Rows:
    """Read and check the rows that DATASET_NAME and DATASET_SPLIT name.

    Raises SettingsError that names file and row of the bad ones; with DROP_BAD_ROWS they are left out and counted.
    """
    if problems := list(missing(settings)):
        raise SettingsError(*problems)
    name = settings.dataset_name
    if name == "samples":
        folder = Path(__file__).with_name("samples")
        languages = [settings.dataset_config] if settings.dataset_config else ["en", "zh"]
        source = [
            (f"samples/{language}.jsonl", row) for language in languages for row in _jsonl(folder / f"{language}.jsonl")
        ]
        commit, found = None, _slice(settings, [(f"{file} {where}", row) for file, (where, row) in source])
    elif not on_hub(name):
        commit, found = (
            None,
            _slice(settings, [(f"{name} {where}", row) for where, row in _file(Path(name).expanduser(), settings)]),
        )
    else:
        commit, found = _from_hub(settings)
    if not found:
        raise SettingsError(f"DATASET_NAME={name}: holds no rows in {settings.dataset_split}")
    first: Row = next((row for _, row in found if isinstance(row, dict)), {})
    messages = "messages" in first and not set(first).issuperset(settings.completion_columns)
    columns = ("messages",) if messages else settings.prompt_columns + settings.completion_columns
    good, bad = [], []
    for where, row in found:
        if not isinstance(row, dict):
            bad.append(f"{where}: is {_kind(row)}, not an object")
        elif problem := _bad_messages(row) if messages else _bad_columns(row, columns):
            bad.append(f"{where}: {problem}")
        else:
            good.append({column: row[column] for column in columns})
    if bad and not settings.drop_bad_rows:
        more = f" (and {len(bad) - SHOWN} more)" if len(bad) > SHOWN else ""
        raise SettingsError(
            *bad[:SHOWN],
            f"{len(bad)} of {len(found)} rows are malformed{more}: every row needs text in {', '.join(columns)}. Mend them, "
            "name other columns (PROMPT_COLUMNS, COMPLETION_COLUMNS), or leave them out with DROP_BAD_ROWS=1.",
        )
    if not good:
        raise SettingsError(f"DATASET_NAME={name}: all {len(bad)} rows are malformed; the first is {bad[0]}")
    if not messages:
        template(settings)  # refused now, and not when a model has come down from the Hub
    digest = hashlib.sha256(json.dumps(good, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    return Rows(name, commit, good, messages, len(found), len(bad), digest)


def _from_hub(settings: Settings) -> tuple[str | None, list[tuple[str, Row]]]:
    from datasets import get_dataset_split_names, load_dataset
    from huggingface_hub import HfApi, constants

    name, config, token = settings.dataset_name, settings.dataset_config, hub.token(settings)
    split = str(re.fullmatch(SPLIT, settings.dataset_split)["name"])  # type: ignore[index]  # checked by settings
    commit: str | None = settings.dataset_revision
    with hub.explained("DATASET_NAME", settings):
        if not constants.is_offline_mode():
            commit = HfApi(token=token).dataset_info(name, revision=settings.dataset_revision).sha
        try:
            found = load_dataset(name, config, split=split, revision=commit, token=token)
        except ValueError as error:
            if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
                raise SettingsError(f"DATASET_CONFIG={config or ''}: {_line(error)}") from None
            if "split" in str(error).lower():
                splits = ", ".join(get_dataset_split_names(name, config, revision=commit, token=token))
                raise SettingsError(f"DATASET_SPLIT={settings.dataset_split}: {name} has {splits}, for example DATASET_SPLIT={splits.split(',')[0]}") from None  # fmt: skip
            raise SettingsError(f"DATASET_NAME={name}: cannot be read as a data set ({_line(error)})") from None
    if constants.is_offline_mode():
        commit = _taken_offline(found, settings.dataset_revision, name)
    names, which = found.column_names, _range(settings, len(found))
    # others may hold pictures or what Python cannot; one stays where none is wanted, for without columns there are no rows
    used = [column for column in names if column in _wanted(settings)] or names[:1]
    rows = found.select(which).select_columns(used)
    return commit, [
        (f"{name} {split} row {index + 1}", {**dict.fromkeys(names), **row})
        for index, row in zip(which, rows, strict=True)
    ]


def _taken_offline(found: Dataset, asked: str, name: str) -> str | None:
    """The commit that was loaded without the Hub; None: unknown. Raises HubError where it is not the one asked for.

    Offline, datasets takes the newest that it has, whatever revision is asked for; its folder tells which one that was.
    """
    taken = next((Path(file["filename"]).parent.name for file in found.cache_files), "")
    if not re.fullmatch(COMMIT, taken):
        return asked if re.fullmatch(COMMIT, asked) else None
    if re.fullmatch(COMMIT, asked) and taken != asked:
        raise HubError(
            f"DATASET_REVISION={asked}: is not in the cache, which has {taken} of {name}, and HF_HUB_OFFLINE is set; load it once "
            "with the network"
        )
    return taken


def missing(settings: Settings) -> Iterator[str]:
    """What is wrong with the files that DATASET_NAME and PROMPT_TEMPLATE name, in sentences."""
    name = settings.dataset_name
    if name != "samples" and not on_hub(name):
        path = Path(name).expanduser()
        if path.suffix.lower() not in SUFFIXES:
            yield (
                f"DATASET_NAME={name}: not a known kind of file; it takes {', '.join(SUFFIXES)}, for example DATASET_NAME=rows.jsonl"
            )
        elif not path.is_file():
            yield f"DATASET_NAME={name}: there is no such file; give its path, in a container the one it is mounted at"
    try:
        _template_file(settings)
    except SettingsError as error:
        yield from error.problems


def _wanted(settings: Settings) -> set[str]:
    """Columns that rows may be made of."""
    return {"messages", *settings.prompt_columns, *settings.completion_columns}


def _file(path: Path, settings: Settings) -> Iterator[tuple[str, Row]]:
    """The rows of a local file, each with its place."""
    parquet = functools.partial(_parquet, _wanted(settings))
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]]
    readers = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": parquet}
    try:
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise SettingsError(f"DATASET_NAME={path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise SettingsError(f"DATASET_NAME={path}: cannot be read ({error.strerror or _line(error)})") from None


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    index = 0
    with open(path, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            index += 1
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SettingsError(
                    f'{path} line {number}: {_not_json(error)}; each line is one object, such as {{"Question": "…"}}'
                ) from None
            yield f"row {index} (line {number})", row


def _json(path: Path) -> Iterator[tuple[str, Row]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f'DATASET_NAME={path}: {_not_json(error)}; it takes a list of objects, such as [{{"Question": "…"}}], and a file '
            "with one object a line is named .jsonl"
        ) from None
    if isinstance(rows, dict):  # {"data": [...]} and the like
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else rows
    if not isinstance(rows, list):
        raise SettingsError(
            f'DATASET_NAME={path}: holds no list; it takes a list of objects, such as [{{"Question": "…"}}]'
        )
    for index, row in enumerate(rows, 1):
        yield f"row {index}", row


def _not_json(error: ValueError | RecursionError) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else f"not JSON ({error})"


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            _named_once(path, reader.fieldnames or ())
            for index, row in enumerate(reader, 1):
                place = f"row {index} (line {reader.line_num})"
                if None in row:
                    raise SettingsError(
                        f"{path} {place}: has more fields than the header; put fields with commas in quotes"
                    )
                yield place, row
        except csv.Error as error:
            raise SettingsError(f"{path} line {reader.line_num}: not CSV ({error})") from None


def _parquet(wanted: set[str], path: Path) -> Iterator[tuple[str, Row]]:
    """Columns that are not wanted are None: they may hold what Python cannot, and messages still name them."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        _named_once(path, names)
        index = 0
        for batch in file.iter_batches(columns=[name for name in names if name in wanted]):
            for row in _converted(path, batch):
                index += 1
                yield f"row {index}", {**dict.fromkeys(names), **row}
    except pyarrow.ArrowInvalid as error:
        raise SettingsError(f"DATASET_NAME={path}: not a whole Parquet file ({_line(error)})") from None


def _converted(path: Path, batch: RecordBatch) -> list[Row]:
    try:
        rows: list[Row] = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # a time beyond Python's, bytes that are not UTF-8
        names = ", ".join(batch.schema.names)
        raise SettingsError(
            f"DATASET_NAME={path}: one of {names} cannot be read ({_line(error)}); save it as text"
        ) from None
    return rows


def _named_once(path: Path, names: Sequence[str]) -> None:
    """Refuse two columns of one name, of which a row would keep the last. No setting can ask for one without a name."""
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise SettingsError(
            f"DATASET_NAME={path}: has more than one column {twice}; name each column once, for example {twice}_2"
        )


def _slice(settings: Settings, rows: list[tuple[str, Row]]) -> list[tuple[str, Row]]:
    """The slice of a local file, whose only split is `train`."""
    parsed = re.fullmatch(SPLIT, settings.dataset_split)
    if parsed is None or parsed["name"] != "train":
        raise SettingsError(
            f"DATASET_SPLIT={settings.dataset_split}: a file has only the split train, for example DATASET_SPLIT=train[0:500]"
        )
    return [rows[index] for index in _range(settings, len(rows))]


def _range(settings: Settings, count: int) -> range:
    """The rows that the slice of DATASET_SPLIT takes out of `count`; bounds beyond the end mean the end."""
    parsed = re.fullmatch(SPLIT, settings.dataset_split)
    assert parsed is not None  # checked by settings

    def bound(text: str | None) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)

    return range(*slice(bound(parsed["start"]), bound(parsed["stop"])).indices(count))


def _bad_columns(row: Row, columns: tuple[str, ...]) -> str | None:
    for column in columns:
        if column not in row:
            return f"has no column {column}; its columns are {', '.join(map(str, row)) or 'none'}"
        if problem := _bad_text(row[column]):
            return f"column {column} {problem}"
    return None


def _bad_text(value: Any) -> str | None:
    if value is None:
        return "is null"
    if not isinstance(value, str):
        return f"is {_kind(value)}, not text"
    if not value.strip():
        return "is only white space" if value else "is empty"
    return _bad_characters(value)


def _bad_characters(text: str) -> str | None:
    """JSON can write half of a surrogate pair, which neither UTF-8 nor a tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has half a character, \\u{ord(text[error.start]):x}; its halves come in pairs, such as \\ud83d\\ude00"
    return None


def _bad_messages(row: Row) -> str | None:
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        return "has no list of messages"
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            return f"message {number} has no role"
        if problem := _bad_text(turn.get("content")):
            return f"content of message {number} {problem}"
        try:
            whole = json.dumps(turn, ensure_ascii=False)  # a chat template may use what else stands in it
        except TypeError as error:  # Parquet has times and bytes
            return f"message {number} cannot be written as JSON ({_line(error)})"
        if problem := _bad_characters(whole):
            return f"message {number} {problem}"
    return None if turns[-1]["role"] == "assistant" else "does not end with the assistant's message"


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text", type(None): "null"}.get(type(value), str(type(value).__name__))  # fmt: skip


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


@dataclasses.dataclass(frozen=True)
class Template:
    """The training text: `prompt` is what the model is given, and ends before the first completion column."""

    text: str
    asked: int

    def fill(self, values: list[str]) -> tuple[str, int]:
        """The whole text, and how many of its characters are the prompt."""
        parts = self.text.split("{}")
        pieces = [parts[0]]
        for value, part in zip(values, parts[1:], strict=True):
            pieces += [value, part]
        prompt = "".join(pieces[: 2 * self.asked + 1]).rstrip()
        return "".join(pieces), len(prompt)

    def prompt(self, question: str) -> str:
        """What the model is given at inference: the tutorial's template up to `<think>`."""
        values = [question, *[""] * (self.text.count("{}") - 1)]
        text, length = self.fill(values)
        return text[:length]


def template(settings: Settings) -> Template:
    """The template of PROMPT_TEMPLATE, or the tutorial's. Raises SettingsError where its {} do not fit the columns."""
    text, columns = _template_file(settings), settings.prompt_columns + settings.completion_columns
    named = settings.prompt_template is not None
    shown = f"PROMPT_TEMPLATE={settings.prompt_template}" if named else "the medical reasoning template"
    if text.count("{}") != len(columns):
        raise SettingsError(
            f"{shown}: has {text.count('{}')} places {{}} for {len(columns)} columns ({', '.join(columns)}); give one {{}} for "
            "each of PROMPT_COLUMNS and COMPLETION_COLUMNS, in that order, in the file that PROMPT_TEMPLATE names"
        )
    return Template(text, len(settings.prompt_columns))


def _template_file(settings: Settings) -> str:
    """The text of the file that PROMPT_TEMPLATE names, or the tutorial's."""
    if settings.prompt_template is None:
        return TEMPLATE
    try:
        return Path(settings.prompt_template).expanduser().read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise SettingsError(f"PROMPT_TEMPLATE={settings.prompt_template}: cannot be read ({why})") from None


def tokenizer(source: hub.Source) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with a PAD in memory that is not its EOS; its files are never changed."""
    from transformers import AutoTokenizer

    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.folder)
    except Exception as error:  # it reads config.json too, and an odd one may raise anything
        raise SettingsError(
            f"MODEL_NAME={source.name}: its tokenizer or config.json cannot be loaded ({_line(error)})"
        ) from None
    if loaded.eos_token_id is None:
        raise SettingsError(
            f"MODEL_NAME={source.name}: its tokenizer has no EOS token, so a model could never end an answer"
        )
    if loaded.pad_token_id is None or loaded.pad_token_id == loaded.eos_token_id:
        # any special token will do that is neither: its label is always IGNORED
        taken = {loaded.eos_token, loaded.bos_token}
        special = [
            t for t in [*map(str, loaded.added_tokens_decoder.values()), loaded.unk_token] if t and t not in taken
        ]
        likely = sorted(special, key=lambda t: (not re.search("pad", t, re.IGNORECASE), "reserved" not in t))
        if likely:
            loaded.pad_token = likely[0]
    return loaded


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The data set that is trained on. Columns input_ids and labels, lists of ints; IGNORED where there is no loss.

    largest: the highest id. common: how many tokens, with their labels, all rows begin with: a template's beginning, a system prompt.
    sha256: of all ids and labels in order. It covers rows, template, tokenizer and length limit at once.
    """

    dataset: Dataset
    truncated: int
    longest: int
    largest: int
    common: int
    total: int
    sha256: str

    def record(self) -> dict[str, Any]:
        """What run.json says of the tokens."""
        return dict(
            trained=len(self.dataset),
            truncated=self.truncated,
            longest=self.longest,
            common=self.common,
            tokens=self.total,
            tokens_sha256=self.sha256,
        )

    def describe(self) -> str:
        """One line for the console."""
        return (
            f"{len(self.dataset)} rows, {self.total:,} tokens, the longest {self.longest}, all beginning with the same "
            f"{self.common}, {self.truncated} truncated"
        )


def tokenize(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Tokens:
    """Texts to tokens, in the order of the rows whatever DATASET_NUM_PROC is.

    Exactly one BOS where the tokenizer uses one, and one EOS, which is trained on, at the end of each row; a row longer
    than MAX_SEQ_LENGTH loses what stands before its EOS, so that the model still learns to stop.
    """
    from datasets import Dataset

    as_text: Callable[[Row], tuple[str, list[tuple[int, int]]]]
    if rows.messages:
        if not tokenizer.chat_template:
            raise SettingsError(
                f"DATASET_NAME={rows.name}: has messages, but {settings.model_name} has no chat template; use its instruct "
                "version, or columns with PROMPT_TEMPLATE"
            )
        as_text = functools.partial(_chat_text, tokenizer)
    else:
        as_text = functools.partial(_template_text, template(settings), tokenizer, settings.prompt_columns + settings.completion_columns)  # fmt: skip
    encode = functools.partial(_encode, as_text, tokenizer, settings.max_seq_length, settings.train_on == "response")
    source = Dataset.from_list([{"row": json.dumps(row, ensure_ascii=False)} for row in rows.rows])
    processes = settings.dataset_num_proc if settings.dataset_num_proc > 1 and len(source) > FEW_ROWS else None
    mapped = source.map(encode, remove_columns=["row"], num_proc=processes, load_from_cache_file=False)
    lost = sum(all(label == IGNORED for label in labels[:-1]) for labels in mapped["labels"])
    if lost:
        raise SettingsError(
            f"MAX_SEQ_LENGTH={settings.max_seq_length}: {lost} rows have nothing left to train on, since their prompt alone is as "
            "long; raise MAX_SEQ_LENGTH, for example MAX_SEQ_LENGTH=4096"
        )
    truncated = sum(mapped["truncated"])
    lengths, largest, digest, common = [], 0, hashlib.sha256(), None
    for ids, labels in zip(mapped["input_ids"], mapped["labels"], strict=True):
        common = _same((ids, labels), common or (ids, labels))
        lengths.append(len(ids))
        largest = max(largest, *ids)
        digest.update(struct.pack(f"<q{2 * len(ids)}i", len(ids), *ids, *labels))
    assert common is not None
    return Tokens(
        mapped.remove_columns(["truncated"]),
        truncated,
        max(lengths),
        largest,
        len(common[0]),
        sum(lengths),
        digest.hexdigest(),
    )


def _same(row: tuple[list[int], list[int]], common: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    """As much of `common`, ids and labels, as the row begins with."""
    size = len(common[0])
    if (row[0][:size], row[1][:size]) == common:
        return common
    pairs = zip(zip(*row, strict=True), zip(*common, strict=True), strict=False)
    size = next((index for index, (one, other) in enumerate(pairs) if one != other), len(row[0]))
    return common[0][:size], common[1][:size]


def _template_text(
    template: Template, tokenizer: PreTrainedTokenizerBase, columns: tuple[str, ...], row: Row
) -> tuple[str, list[tuple[int, int]]]:
    """Text and the character spans that are the response. BOS and EOS written out in a row are taken out of it."""
    special = [token for token in (tokenizer.eos_token, tokenizer.bos_token) if token]
    values = []
    for column in columns:
        value = row[column]
        for token in special:
            value = value.replace(token, "")
        values.append(value)
    text, prompt = template.fill(values)
    return text, [(prompt, len(text))]


def _chat_text(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[str, list[tuple[int, int]]]:
    """The model's own chat format, and the spans of the assistant's turns."""
    messages = row["messages"]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        spans = []
        for index, turn in enumerate(messages):
            if turn["role"] == "assistant":
                before = (
                    str(tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True))
                    if index
                    else ""
                )
                through = str(tokenizer.apply_chat_template(messages[: index + 1], tokenize=False))
                # a template may rewrite earlier turns (drop their reasoning): such a turn has no span of its own
                if text.startswith(before) and text.startswith(through.rstrip()):
                    spans.append((len(before), len(through.rstrip())))
    except Exception as error:  # templates raise what they like
        raise SettingsError(
            f"the model's chat template refuses a row ({_line(error)}); its messages begin: {str(messages)[:120]}"
        ) from None
    if not spans:
        raise SettingsError(f"the model's chat template leaves no answer to train on in: {str(messages)[:120]}")
    eos = tokenizer.eos_token
    kept = text.rstrip()
    return (kept if kept.endswith(eos) else text), spans


def _encode(as_text: Callable[[Row], tuple[str, list[tuple[int, int]]]], tokenizer: PreTrainedTokenizerBase, limit: int, response: bool, example: Row) -> Row:  # fmt: skip
    text, spans = as_text(json.loads(example["row"]))
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    begun = bool(bos) and text.startswith(bos)
    encoded = tokenizer(text, add_special_tokens=not begun, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    ended = ids[-1] == tokenizer.eos_token_id
    if ended:
        ids, offsets = ids[:-1], offsets[:-1]
    cut = len(ids) + 1 > limit
    ids, offsets = ids[: limit - 1], offsets[: limit - 1]
    trained = [not response or any(a <= start and end <= b and end > start for a, b in spans) for start, end in offsets]
    labels = [token if use else IGNORED for token, use in zip(ids, trained, strict=True)]
    assert eos is not None
    return dict(input_ids=[*ids, tokenizer.eos_token_id], labels=[*labels, tokenizer.eos_token_id], truncated=cut)
