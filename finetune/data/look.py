"""What there is to see of rows before they are trained: lengths, what is cut, near-duplicates, languages, special tokens."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data import near_duplicates, shown
from finetune.data.encoder import Encoder
from finetune.data.formats.base import special_texts
from finetune.data.packing import arrays
from finetune.data.rows import Rows
from finetune.data.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BARS = 12  # of the histogram, and how many letters the longest is wide
WIDTH = 40
EXAMPLES = 5
SAMPLE = 20_000  # rows, evenly spread, that are looked at for near-duplicates and languages
CUT = 1000  # rows that are tokenized again, to see how long they are when nothing is cut
SKETCH = 16  # hashes that stand for a row; two rows that share half of them are near-duplicates
NO_LIMIT = 2**31 - 1
# Letters by their script. A language is not told from another that is written alike.
SCRIPTS = {
    "Han (Chinese)": "\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0002ebef", "Kana (Japanese)": "\u3040-\u30ff", "Hangul (Korean)": "\u1100-\u11ff\uac00-\ud7af",
    "Latin": "A-Za-z\u00c0-\u024f", "Cyrillic": "\u0400-\u04ff", "Greek": "\u0370-\u03ff", "Arabic": "\u0600-\u06ff", "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f", "Bengali": "\u0980-\u09ff", "Tamil": "\u0b80-\u0bff", "Thai": "\u0e00-\u0e7f",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Look:
    """What was found. lengths: (fewest, most, rows) of each bar. longest: tokens of the longest row if nothing were cut.

    cut: places of the first rows that are cut. examples: place and text. twice: pairs of places. scripts: rows by the script of most
    of their letters. special: text and number of each special token. sampled: rows that were looked at for the last but one.
    """

    lengths: list[tuple[int, int, int]]
    truncated: int
    longest: int
    cut: list[str]
    examples: list[tuple[str, str]]
    duplicates: int
    twice: list[tuple[str, str]]
    scripts: list[tuple[str, int]]
    special: list[tuple[str, int]]
    sampled: int


def look(rows: Rows, tokens: Tokens, tokenizer: PreTrainedTokenizerBase, encoder: Encoder) -> Look:
    """Look at rows and their tokens. encoder: as for the tokens."""
    count = len(tokens.dataset)
    sample = np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).astype(int)).tolist()
    numbers = list(tokens.dataset.numbers())
    special, truncated = _special(tokens, tokenizer)
    cut = [numbers[index] for index in truncated[:CUT]]
    whole = dataclasses.replace(encoder, limit=NO_LIMIT).many(rows.some(cut)) if cut else []
    twice = _twice(tokens, sample)
    spread = sorted({sample[at] for at in np.linspace(0, len(sample) - 1, min(EXAMPLES, len(sample))).astype(int)})
    return Look(
        lengths=_histogram(tokens.lengths),
        truncated=tokens.truncated,
        longest=max([tokens.longest, *(len(row["input_ids"]) for row in whole)]),
        cut=[rows.places[number] for number in cut[:EXAMPLES]],
        examples=[
            (
                rows.places[numbers[index]],
                shown.row(tokenizer, **tokens.dataset[index]),
            )
            for index in spread
        ],
        duplicates=len(twice),
        twice=[(rows.places[numbers[a]], rows.places[numbers[b]]) for a, b in twice[:EXAMPLES]],
        scripts=_scripts(rows, [numbers[index] for index in sample]),
        special=special,
        sampled=len(sample),
    )


def _histogram(lengths: Any) -> list[tuple[int, int, int]]:
    low, high = int(lengths.min()), int(lengths.max())
    step = max(1, -(-(high - low + 1) // BARS))
    starts = range(low, high + 1, step)
    counts = np.bincount((lengths - low) // step, minlength=len(starts))
    return [(start, min(high, start + step - 1), int(count)) for start, count in zip(starts, counts, strict=True)]


def _special(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> tuple[list[tuple[str, int]], list[int]]:
    """How often each special token is in the tokens; and the first rows that are cut."""
    ids = {int(tokenizer.convert_tokens_to_ids(text)): text for text in special_texts(tokenizer)}
    counted: Counter[int] = Counter()
    truncated: list[int] = []
    seen = 0
    for batch in tokens.dataset.streamed:
        found, _, _ = arrays(batch)
        inside, counts = np.unique(found[np.isin(found, [*ids])], return_counts=True)
        counted.update(dict(zip(inside.tolist(), counts.tolist(), strict=True)))
        if len(truncated) < CUT:
            flags = batch.column("truncated").to_numpy(zero_copy_only=False)
            truncated += (np.flatnonzero(flags) + seen).tolist()
        seen += batch.num_rows
    return [(ids[token], count) for token, count in counted.most_common()], truncated[:CUT]


def _twice(tokens: Tokens, sample: Sequence[int]) -> list[tuple[int, int]]:
    """Rows of the sample that are near-duplicates, each with one before it.

    The smallest hashes of a row's runs of tokens stand for it. Rows that share half of them are alike.
    """
    hashes, owners = [], []
    for index in sample:
        ids = np.array(tokens.dataset[index]["input_ids"], np.int64)
        behind = ids[tokens.common : -1]
        filled = np.pad(behind, (0, max(0, near_duplicates.GRAM - len(behind))), constant_values=-1)
        mixed = np.unique(near_duplicates.hashes(filled))[:SKETCH]
        hashes.append(mixed)
        owners.append(np.full(len(mixed), index))
    size_of = {index: len(mixed) for index, mixed in zip(sample, hashes, strict=True)}
    every, owner = np.concatenate(hashes), np.concatenate(owners)
    order = np.lexsort((owner, every))
    every, owner = every[order], owner[order]
    next_to = every[1:] == every[:-1]  # in a family of rows each is compared with the one before it
    pairs, counts = np.unique(np.stack([owner[:-1][next_to], owner[1:][next_to]]), axis=1, return_counts=True)
    found: dict[int, int] = {}
    for (first, second), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
        if 2 * count >= max(size_of[first], size_of[second]):
            found.setdefault(second, first)
    return [(first, second) for second, first in sorted(found.items())]


def _scripts(rows: Rows, numbers: Sequence[int]) -> list[tuple[str, int]]:
    letters = {name: re.compile(f"[{span}]") for name, span in SCRIPTS.items()}
    counted: Counter[str] = Counter()
    for row in rows.some(numbers):
        text = "".join(_texts(row))
        of = {name: len(pattern.findall(text)) for name, pattern in letters.items()}
        most = max(of, key=lambda name: of[name])
        if of["Kana (Japanese)"] * 10 > of[most]:  # Japanese has more characters of Han than of its own
            most = "Kana (Japanese)"
        counted[most if of[most] else "no letters of these"] += 1
    return counted.most_common()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def parts(found: Look, rows: Rows, limit: int) -> list[tuple[str, list[str]]]:
    """What was found, for people: titles, each with its lines. limit: MAX_SEQ_LENGTH."""
    total = sum(count for _, _, count in found.lengths)
    most = max(count for _, _, count in found.lengths)
    wide = len(f"{found.lengths[-1][1]:,}")
    bars = [
        f"{low:>{wide},} to {high:>{wide},}  {'█' * -(-WIDTH * count // most)} {count:,}"
        for low, high, count in found.lengths
    ]
    cut = ["no row is cut"]
    if found.truncated:
        cut = [
            f"{found.truncated:,} of {total:,} rows lose their ends at MAX_SEQ_LENGTH={limit}, first {', '.join(found.cut)}",
            f"MAX_SEQ_LENGTH={found.longest} would keep "
            + ("all of them" if found.truncated <= CUT else f"the first {CUT} of them"),
        ]
    of = f" of {found.sampled:,} rows, evenly spread over {total:,}" if found.sampled < total else ""
    twice = (
        [f"{found.duplicates:,}{of or ' rows'} are (almost) equal to a row before them"]
        if found.duplicates
        else [f"none{of}"]
    )
    twice += [f"{second} is like {first}" for first, second in found.twice]
    scripts = [f"{name}: {count:,} ({100 * count / found.sampled:.1f} %)" for name, count in found.scripts]
    return [
        ("Tokens of a row", bars),
        ("Cut", cut),
        ("Near-duplicates", twice),
        (f"Languages, by the script of most letters{of and f' ({of.strip()})'}", scripts),
        ("Special tokens in the training text", [f"{text}: {count:,}" for text, count in found.special] or ["none"]),
    ]
