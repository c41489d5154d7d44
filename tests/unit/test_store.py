"""The store of rows and tokens: whole or not at all, gone on with, shared, and as small in memory for many rows as for few."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from conftest import ROOT
from finetune import data
from finetune.data import checked, packing, rows, store, tokenized
from finetune.errors import MachineError, SettingsError
from finetune.settings import Settings, declarations
from finetune.sources.model import Source

COLUMNS = {"PROMPT_COLUMNS": "q", "COMPLETION_COLUMNS": "a", "EVAL_ROWS": 0}


def made(path: Path, count: int) -> Path:
    (path.parent / "template.txt").write_text("Q: {}\nA: {}")
    with open(path, "w") as stream:
        for i in range(count):
            stream.write(json.dumps({"q": f"What is {i} and {i * 7}?", "a": f"It is {'very ' * (i % 13)}{i}."}) + "\n")
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    tiny.tokenizer("llama").save_pretrained(folder)
    return folder


def tokens(path: Path, words: Path, **values: Any) -> tuple[data.Rows, data.Tokens]:
    given = {"DATASET_NAME": path, "PROMPT_TEMPLATE": path.parent / "template.txt", **COLUMNS, **values}
    settings = Settings.from_env({name: str(value) for name, value in given.items()})
    found = data.load(settings)
    return found, data.tokenize(found, data.tokenizer(Source("words", None, words)), settings)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows are tokenized from now on, in a list of one number."""
    done, many = [0], data.encoder.Encoder.many

    def noted(self: Any, given: list[Any]) -> Any:
        done[0] += len(given)
        return many(self, given)

    monkeypatch.setattr(data.encoder.Encoder, "many", noted)
    return done


@pytest.mark.parametrize("train_on", ["all", "response"])
def test_hashes_and_counts_are_those_of_lists(tmp_path: Path, words: Path, train_on: str, monkeypatch: Any) -> None:
    """As they were when all rows were in memory: computed here anew, in that way."""
    monkeypatch.setattr(store, "SHARD_ROWS", 70)
    monkeypatch.setattr(tokenized, "CHUNK", 20)
    monkeypatch.setattr(checked, "BATCH", 30)
    found, made_of = tokens(made(tmp_path / "rows.jsonl", 230), words, TRAIN_ON=train_on, MAX_SEQ_LENGTH=32)
    listed = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert found.rows == listed and found.rows[229] == listed[229] and found.rows[-1] == listed[-1]
    assert found.sha256 == hashlib.sha256(json.dumps(listed, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    assert found.places[5] == f"{tmp_path}/rows.jsonl row 6 (line 6)" and len(found.places) == 230
    assert len(list(store.cache().glob("tokens-*/0*.arrow"))) == 3
    digest, everything = hashlib.sha256(), list(made_of.dataset)
    for row in everything:
        ids, labels = row["input_ids"], row["labels"]
        digest.update(struct.pack(f"<q{2 * len(ids)}i", len(ids), *ids, *labels))
        assert all(label in (token, data.IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
    pairs = [list(zip(row["input_ids"], row["labels"], strict=True)) for row in everything]
    alike = next(n for n in range(99) if len({tuple(pair[n : n + 1]) for pair in pairs}) > 1)
    assert (made_of.sha256, made_of.common) == (digest.hexdigest(), alike)
    assert made_of.lengths.tolist() == [len(row["input_ids"]) for row in everything]
    assert made_of.trained == sum(label != data.IGNORE_INDEX for row in everything for label in row["labels"])
    assert made_of.largest == max(max(row["input_ids"]) for row in everything) and made_of.truncated > 0
    assert made_of.dataset[3:5]["input_ids"] == [everything[3]["input_ids"], everything[4]["input_ids"]]
    assert (train_on == "all") == (made_of.trained == made_of.total)


def test_spans_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    given = []
    for size in [*rng.integers(1, 9, 200), 1, 1]:
        ids = rng.integers(0, 99, size).tolist()
        labels = [i if keep else data.IGNORE_INDEX for i, keep in zip(ids, rng.random(size) < 0.6, strict=True)]
        given.append({"input_ids": ids, "labels": labels, **dict.fromkeys(packing.FLAGS, False)})
    batch = packing.packed(given, range(len(given)))
    for part in (batch, batch.slice(0, 0), batch.slice(17, 1), batch.slice(50, 100)):
        ids, labels, offsets = packing.arrays(part)
        first = part["row"][0].as_py() if part.num_rows else 0
        for index in range(part.num_rows):
            wanted = given[first + index]
            assert ids[offsets[index] : offsets[index + 1]].tolist() == wanted["input_ids"]
            assert labels[offsets[index] : offsets[index + 1]].tolist() == wanted["labels"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 100)])
@pytest.mark.parametrize("name", ["rows-*/00000.arrow", "tokens-*/00000.arrow", "tokens-*/lengths.npy"])
def test_a_store_that_is_no_longer_whole_is_made_anew(tmp_path: Path, words: Path, name: str, damage: Any) -> None:
    _, first = tokens(made(tmp_path / "rows.jsonl", 5), words)
    record, rows = first.record(), list(first.dataset)
    damage(next(store.cache().glob(name)))
    (store.cache() / "a-file-of-somebody").touch()
    _, again = tokens(tmp_path / "rows.jsonl", words)
    assert again.record() == record and list(again.dataset) == rows


def test_a_second_start_reads_and_tokenizes_nothing(tmp_path: Path, words: Path, monkeypatch: Any) -> None:
    path, done = made(tmp_path / "rows.jsonl", 50), counted(monkeypatch)
    _, first = tokens(path, words)
    assert done == [50]
    path.rename(tmp_path / "moved.jsonl")
    found, again = tokens(tmp_path / "moved.jsonl", words, DATASET_NUM_PROC=1, LEARNING_RATE=1e-3)
    assert done == [50] and again.sha256 == first.sha256 and again.record() == first.record()
    assert found.places[0] == f"{tmp_path}/moved.jsonl row 1 (line 1)"
    for change in (dict(MAX_SEQ_LENGTH=20), dict(TRAIN_ON="response"), dict(DATASET_SPLIT="train[:50]")):
        tokens(tmp_path / "moved.jsonl", words, **change)
    assert done == [150]  # the slice gives the same rows, so their tokens are there
    (tmp_path / "template.txt").write_text("{} {}")
    tokens(tmp_path / "moved.jsonl", words)
    made(tmp_path / "moved.jsonl", 51)
    tokens(tmp_path / "moved.jsonl", words)
    assert done == [251]


def test_every_setting_that_this_room_reads_is_in_the_key() -> None:
    """Else two runs would share tokens that are not the same."""
    known = {declared.field for declared in declarations()}
    code = "".join(path.read_text() for path in (ROOT / "finetune" / "data").rglob("*.py"))
    read = set(re.findall(r"settings\.(\w+)", code)) & known
    # model_name is for messages, and the tokenizer itself is in the key; so is the content of what dataset_name and its revision name.
    # Tokens do not depend on the number of processes or the way that rows come, and what is asked after training is not stored.
    elsewhere = {"model_name", "dataset_name", "dataset_revision", "dataset_num_proc", "eval_questions", "streaming"}
    assert read - elsewhere <= {*rows.READING, *rows.TOKENIZING}, "add it to one of them"


BREAKS = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import os, signal
from pathlib import Path
import test_store as t
from finetune.data import store, checked, tokenized
store.SHARD_ROWS, checked.BATCH, tokenized.CHUNK = 200, 50, 50
stop, replace = int(sys.argv[3]), os.replace
def replaced(source, target):
    global stop
    stop -= str(target).endswith('.arrow')
    if stop < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replaced
found, made = t.tokens(Path(sys.argv[1]), Path(sys.argv[2]), DATASET_NUM_PROC=sys.argv[4], DROP_BAD_ROWS=1)
print(found.sha256, made.sha256, found.dropped, found.seen)
"""


def program(path: Path, words: Path, shards: int, processes: int) -> subprocess.Popen[str]:
    """Tokenizes in a process of its own, which kills itself when so many shards are whole."""
    code = BREAKS.format(root=str(ROOT), tests=str(ROOT / "tests" / "unit"))
    command = [sys.executable, "-c", code, str(path), str(words), str(shards), str(processes)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


@pytest.mark.parametrize(("kills", "processes"), [((3, 4), 2)])
def test_a_killed_start_is_gone_on_with_to_the_same_hashes(
    tmp_path: Path, words: Path, kills: tuple[int, ...], processes: int, monkeypatch: Any
) -> None:
    """1,150 good rows are 6 shards of rows and 6 of tokens: the first kills are among the one, the others among the other."""
    path = made(tmp_path / "rows.jsonl", 1150)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:300], "{", *lines[300:900], "[]", *lines[900:]]))
    for shards in kills:
        process = program(path, words, shards, processes)
        assert process.wait(60) == -signal.SIGKILL, process.communicate()
    whole = len(list(store.cache().glob("*/0*.json")))
    assert whole == sum(kills) and not list(store.cache().glob("tokens-*/done.json"))
    process = program(path, words, 99, processes)
    out, problems = process.communicate(timeout=60)
    assert process.returncode == 0, problems
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "other"))
    found, undisturbed = tokens(path, words, DROP_BAD_ROWS=1)
    assert out.split()[-4:] == [found.sha256, undisturbed.sha256, "2", "1152"]
    assert not list(store.cache().glob("*/*.partial"))


def test_two_at_once_do_no_harm(tmp_path: Path, words: Path) -> None:
    path = made(tmp_path / "rows.jsonl", 1150)
    both = [program(path, words, 99, 1) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len({out.splitlines()[-1] for out, _ in said}) == 1
    assert len(list(store.cache().glob("tokens-*/0*.arrow"))) == 6


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_store_of_another_user_is_read(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        monkeypatch.setenv("HF_DATASETS_CACHE", name)
        given = {"DATASET_SPLIT": "train[:20]", "EVAL_ROWS": 20}
        path, own = made(place / "rows.jsonl", 40), shutil.copytree(words, place / "words")
        for file in (own, *own.iterdir()):
            file.chmod(0o755)
        _, first = tokens(path, own, **given)
        next(store.cache().glob("tokens-*/near-*")).unlink()
        os.seteuid(65534)
        try:
            _, again = tokens(path, own, **given)
        finally:
            os.seteuid(0)
        assert again.record() == first.record() and again.held_out == first.held_out
        assert not list(store.cache().glob("tokens-*/near-*"))


def test_bad_rows_leave_no_store(tmp_path: Path, words: Path) -> None:
    path = made(tmp_path / "rows.jsonl", 5)
    path.write_text(path.read_text() + '{"q": "a"}\n')
    with pytest.raises(SettingsError, match="1 of 6 rows are malformed"):
        tokens(path, words)
    assert not list(store.cache().iterdir())


def test_old_stores_go_and_open_ones_stay(tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens(made(tmp_path / "rows.jsonl", 5), words)
    old = time.time() - 86400 * (store.UNUSED_DAYS + 1)
    (used,) = store.cache().glob("tokens-*")
    (unused,) = store.cache().glob("rows-*")
    with store.opened("other", {}) as held:
        for place in (used, unused, held.folder):
            os.utime(place, (old, old))
        tokens(tmp_path / "rows.jsonl", words, MAX_SEQ_LENGTH=30)  # of the same rows, so that these are used now
        assert unused.is_dir() and held.folder.is_dir() and not used.is_dir()
    monkeypatch.setattr(store, "SHARE", 0)
    tokens(tmp_path / "rows.jsonl", words, MAX_SEQ_LENGTH=31)
    assert [place.name.split("-")[0] for place in store.cache().iterdir()] == ["tokens"]


def test_a_disk_that_is_too_small_is_told_before(tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: type("Usage", (), dict(total=10, free=10)))
    with pytest.raises(MachineError, match=r"0\.0 GB free, about .* HF_DATASETS_CACHE=/data/cache"):
        tokens(made(tmp_path / "rows.jsonl", 5), words)


PEAK = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import test_store as t
t.tokens(Path(sys.argv[1]), Path(sys.argv[2]), DATASET_NUM_PROC=1)
print(next(line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line))
"""


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path, words: Path) -> None:
    peaks = []
    for count in (2000, 20_000):
        path = made(tmp_path / f"{count}.jsonl", count)
        code = PEAK.format(root=str(ROOT), tests=str(ROOT / "tests" / "unit"))
        environ = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
        command = [sys.executable, "-c", code, str(path), str(words)]
        peaks.append(
            int(subprocess.run(command, capture_output=True, text=True, env=environ, check=True).stdout.split()[-1])
        )
    assert peaks[1] < 1.05 * peaks[0], peaks
