"""Training text -> tokens, once for both engines, and which of them the loss is on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from finetune import hub
from finetune.data import processes
from finetune.data.prompt import Template, template
from finetune.data.reading import Row
from finetune.data.rows import Rows
from finetune.errors import SettingsError, first_line
from finetune.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label that the loss leaves out


def tokenizer(source: hub.Source) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with a PAD in memory that the model knows and, where there is another, is not its EOS.

    Its files are never changed. Raises SettingsError where it cannot be loaded, or has no EOS.
    """
    from transformers import AutoTokenizer

    config = source.config()
    text = config.get("text_config", config)  # of a model that takes pictures too
    size = text.get("vocab_size") if isinstance(text, dict) else None
    known = size if isinstance(size, int) else math.inf
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # it reads config.json too, and an odd one may raise anything
        raise SettingsError(
            f"MODEL_NAME={source.name}: its tokenizer or config.json cannot be loaded ({first_line(error)})"
        ) from None
    if not loaded.is_fast:
        raise SettingsError(
            f"MODEL_NAME={source.name}: its tokenizer ({type(loaded).__name__}) does not tell which characters a token stands for; take "
            "a model that has a tokenizer.json"
        )
    if loaded.eos_token_id is None:
        raise SettingsError(
            f"MODEL_NAME={source.name}: its tokenizer has no EOS token, so a model could never end an answer"
        )
    if loaded.pad_token_id is None or loaded.pad_token_id == loaded.eos_token_id or loaded.pad_token_id >= known:
        # any special token will do that is neither, and that the model knows: its label is always IGNORED
        taken = {loaded.eos_token, loaded.bos_token}
        special = [
            t for t in [*map(str, loaded.added_tokens_decoder.values()), loaded.unk_token]
            if t and t not in taken and loaded.convert_tokens_to_ids(t) < known
        ]  # fmt: skip
        likely = sorted(special, key=lambda t: (not re.search("pad", t, re.IGNORECASE), "reserved" not in t))
        loaded.pad_token = likely[0] if likely else loaded.eos_token
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

    Raises SettingsError where messages find no chat template, or a row keeps nothing to train on, PreflightError where a process
    was killed.
    """
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
    mapped = processes.results(encode, rows.rows, settings.dataset_num_proc)
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
        while any(token in value for token in special):  # what is left may be one again
            for token in special:
                value = value.replace(token, "")
        values.append(value)
    text, prompt = template.fill(values)
    return text, [(prompt, len(text))]


def _chat_text(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[str, list[tuple[int, int]]]:
    """The model's own chat format, and the spans of the assistant's turns."""
    messages, written = row["messages"], functools.partial(tokenizer.apply_chat_template, tokenize=False)
    try:
        text = str(written(messages))
        spans = []
        for index, turn in enumerate(messages):
            if turn["role"] == "assistant":
                before = str(written(messages[:index], add_generation_prompt=True)) if index else ""
                if not text.startswith(before):
                    # a reasoning model's asks with <think> opened, which no answer has to have
                    before = re.sub(r"<think>\s*$", "", before)
                through = str(written(messages[: index + 1])).rstrip()
                # a template may rewrite earlier turns (drop their reasoning): such a turn has no span of its own
                if text.startswith(before) and text.startswith(through):
                    spans.append((len(before), len(through)))
    except Exception as error:  # templates raise what they like
        raise SettingsError(
            f"the model's chat template refuses a row ({first_line(error)}); its messages begin: {str(messages)[:120]}"
        ) from None
    if not spans:
        raise SettingsError(f"the model's chat template leaves no answer to train on in: {str(messages)[:120]}")
    eos = tokenizer.eos_token
    kept = text.rstrip()
    return (kept if kept.endswith(eos) else text), spans


def _encode(as_text: Callable[[Row], tuple[str, list[tuple[int, int]]]], tokenizer: PreTrainedTokenizerBase, limit: int, response: bool, row: Row) -> Row:  # fmt: skip
    text, spans = as_text(row)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    begun = bool(bos) and text.startswith(bos)
    encoded = tokenizer(text, add_special_tokens=not begun, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    ended = ids[-1] == tokenizer.eos_token_id
    if ended:
        ids, offsets = ids[:-1], offsets[:-1]
    cut = len(ids) + 1 > limit
    ids, offsets = ids[: limit - 1], offsets[: limit - 1]
    # a BOS that the tokenizer adds is at (0, 0); white space may have no width, at its end: GPT-NeoX's tokenizer trims offsets
    trained = [not response or any(a <= start and a < end <= b for a, b in spans) for start, end in offsets]
    labels = [token if use else IGNORED for token, use in zip(ids, trained, strict=True)]
    assert eos is not None
    return dict(input_ids=[*ids, tokenizer.eos_token_id], labels=[*labels, tokenizer.eos_token_id], truncated=cut)
