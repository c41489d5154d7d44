"""Damaged and forged folders: `verify` names what is wrong, and `ask` does not answer from it. No traceback, exit code 5.

The record is changed with the file where a forgery is meant, so that hashes fit and the content alone can tell.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune import errors
from finetune.errors import OutputError
from finetune.run import folder
from finetune.run import record as records
from finetune.settings import Settings
from finetune.verbs import ask, verify

Header = dict[str, Any]


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def refused(run: Path) -> str:
    """What `verify` says. An error that is no refusal would be a traceback."""
    with pytest.raises(OutputError) as caught:
        list(verify.lines(Settings.from_env({"OUTPUT_DIR": str(run)})))
    return str(caught.value)


def recorded(run: Path) -> None:
    """Make the record fit the files."""
    record = json.loads((run / "run.json").read_bytes())
    record["files"] = records.entries(run, [name for name in record["files"] if (run / name).is_file()], {})
    (run / "run.json").write_text(json.dumps(record))


def headed(path: Path, change: Callable[[Header], Any]) -> None:
    """Write a safetensors file with another header: what `change` returns, or the header as it changed it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    made = change(header)
    text = made if isinstance(made, bytes) else json.dumps(header if made is None else made).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def first(header: Header) -> Header:
    """The entry of the file's first tensor."""
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return min(entries, key=lambda entry: int(entry["data_offsets"][0]))


def second(header: Header) -> Header:
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return sorted(entries, key=lambda entry: int(entry["data_offsets"][0]))[1]


HEADERS: dict[str, Callable[[Header], Any]] = {
    "a type of twice the size": lambda h: first(h).update(dtype="F64"),
    "a type that is none": lambda h: first(h).update(dtype=7),
    "a type without a name": lambda h: first(h).update(dtype=[]),
    "another shape": lambda h: first(h).update(shape=[1, 1]),
    "a shape below zero": lambda h: first(h).update(shape=[-16, -64]),
    "a shape of fractions": lambda h: first(h).update(shape=[16.0, 64.0]),
    "a shape in letters": lambda h: first(h).update(shape="16"),
    "offsets beyond the end": lambda h: first(h).update(data_offsets=[0, 2**40]),
    "offsets below zero": lambda h: first(h).update(data_offsets=[-8, 8]),
    "offsets in letters": lambda h: first(h).update(data_offsets=["0", "8"]),
    "three offsets": lambda h: first(h).update(data_offsets=[0, 4, 8]),
    "tensors that overlap": lambda h: second(h).update(data_offsets=first(h)["data_offsets"]),
    "a hole": lambda h: h.pop(next(name for name in h if h[name] is first(h))) and None,
    "no entry": lambda h: first(h).clear(),
    "a list": lambda h: [h],
    "no JSON": lambda h: b"{" + b" " * 100,
    "a thousand braces": lambda h: b"[" * 100_000,
    "a name twice as long as all": lambda h: h.update({"x" * 5000: first(h)}),
}


@pytest.mark.parametrize("part", ["adapter/adapter_model.safetensors", "merged/model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("lie", HEADERS)
def test_a_header_that_lies(run: Path, part: str, lie: str) -> None:
    headed(run / part, HEADERS[lie])
    recorded(run)
    assert str(run) in refused(run)


@pytest.mark.parametrize("length", [0, 1, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("part", ["adapter/adapter_model.safetensors", "merged/model-00002-of-00003.safetensors"])
def test_a_length_of_the_header_that_cannot_be(run: Path, part: str, length: int) -> None:
    (run / part).write_bytes(length.to_bytes(8, "little") + (run / part).read_bytes()[8:])
    recorded(run)
    assert "not a whole safetensors file" in refused(run)


CONFIGS: dict[str, Any] = {
    "a list": [], "a number": 5, "nothing": {}, "no rank": dict(r=None), "rank 0": dict(r=0), "a rank in letters": dict(r="16"),
    "a rank below zero": dict(r=-16), "true as rank": dict(r=True), "another rank": dict(r=8), "no alpha": dict(lora_alpha=None),
    "an alpha that is no number": dict(lora_alpha=float("nan")), "an alpha in a list": dict(lora_alpha=[16]),
    "another alpha": dict(lora_alpha=17), "another kind": dict(peft_type="IA3"), "DoRA": dict(use_dora=True),
    "a rank for one module": dict(rank_pattern={"q_proj": 4}), "whole modules": dict(modules_to_save=["lm_head"]),
}  # fmt: skip


@pytest.mark.parametrize("odd", CONFIGS)
def test_an_odd_adapter_config(run: Path, odd: str) -> None:
    path, change = run / "adapter" / "adapter_config.json", CONFIGS[odd]
    whole = isinstance(change, dict) and change
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change} if whole else change))
    recorded(run)
    assert str(run) in refused(run)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "no UTF-8", "braces"]
)
@pytest.mark.parametrize("part", ["adapter/adapter_config.json", "merged/model.safetensors.index.json", "run.json"])
def test_a_file_that_is_no_json(run: Path, part: str, content: bytes) -> None:
    (run / part).write_bytes(content)
    if part != "run.json":
        recorded(run)
    assert str(run) in refused(run)


@pytest.mark.parametrize("weights", [[], {"a": 5}, {"a": None}, "text", {"a": "../../x"}])
def test_an_index_that_lies(run: Path, weights: Any) -> None:
    (run / "merged" / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weights)))
    recorded(run)
    assert str(run) in refused(run)


def test_bytes_behind_the_weights(run: Path) -> None:
    for part in ("merged/model-00001-of-00003.safetensors", "adapter/adapter_model.safetensors"):
        with open(run / part, "ab") as stream:
            stream.write(b"more")
        recorded(run)
        assert "not a whole safetensors file" in refused(run)


@pytest.mark.parametrize(
    "place",
    ["adapter/x.py", "merged/sub/x.bin", "checkpoints/x", "checkpoints/checkpoint-2/x", "checkpoints/checkpoint-x/y"],
)
def test_an_added_file(run: Path, place: str) -> None:
    (run / place).parent.mkdir(exist_ok=True)
    (run / place).write_bytes(b"?")
    assert "is not of this run" in refused(run)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_checkpoint_of_a_finished_run(run: Path, damage: str) -> None:
    path = run / "checkpoints" / "checkpoint-2" / "optimizer.pt"
    content = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(
        flipped(content) if damage == "flipped" else content[:-9]
    )
    assert "damaged or missing: optimizer.pt" in refused(run)


def flipped(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing", "added"])
@pytest.mark.parametrize("part", ["adapter", "merged"])
def test_ask_does_not_answer_from_a_damaged_folder(run: Path, part: str, damage: str) -> None:
    if part == "merged":
        shutil.rmtree(run / "adapter")
    path = next((run / part).glob("*.safetensors"))
    content = path.read_bytes()
    path.unlink()
    if damage == "added":
        path.with_suffix(".bin").write_bytes(b"?")
    if damage != "missing":
        made = dict(flipped=flipped(content), cut=content[:-100], empty=b"", added=content)
        path.write_bytes(made[damage])
    with pytest.raises(OutputError, match=rf"{part}/"):
        ask.run(Settings.from_env({"OUTPUT_DIR": str(run)}), {}, "What is it?")


def test_a_finished_run_without_its_checkpoints_is_complete(run: Path) -> None:
    """They are large, and a finished run does not need them: the same command finds the run complete, another is refused."""
    record = records.read(run / "run.json", OutputError)
    identity = json.loads((run / "checkpoints" / "identity.json").read_bytes())
    settings = Settings.from_env({"OUTPUT_DIR": str(run)})
    assert folder.begin(settings, run, identity)
    shutil.rmtree(run / "checkpoints")
    assert folder.begin(settings, run, identity)
    with pytest.raises(errors.SettingsError, match="SEED: was 3407, is now 1"):
        folder.begin(settings, run, {**identity, "SEED": 1})
    assert record == records.read(run / "run.json", OutputError)
    assert list(verify.lines(settings))
