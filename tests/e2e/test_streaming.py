"""STREAMING=1: rows of the Hub over real HTTP with the real `datasets`; the same rows, and no file of theirs on the disk."""

from __future__ import annotations

import errno
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import HfFileSystem, close_session, constants

from finetune import data
from finetune.data import checked, origin, store
from finetune.errors import HubError, MachineError, SettingsError
from finetune.settings import Settings
from finetune.sources import client, stream
from hub_server import HubServer

ROWS = [
    {"Question": f"q{i}", "Complex_CoT": f"because {i}", "Response": "发热" * (i % 7 + 1), "n": i} for i in range(3000)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CARD = b"---\ndataset_info:\n  features:\n" + b"".join(
    b"  - name: %s\n    dtype: %s\n" % pair
    for pair in [(b"Question", b"string"), (b"Complex_CoT", b"string"), (b"Response", b"string"), (b"n", b"int64")]
)
TOTAL = b"  splits:\n  - name: train\n    num_examples: %d\n    num_bytes: 1000\n---\n"


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer(quiet=True) as hub:
        hub.add("dataset", "org/rows", {"rows.jsonl": LINES})
        hub.add("dataset", "org/told", {"rows.jsonl": LINES, "README.md": CARD + TOTAL % 3000})
        hub.add("dataset", "org/wrong", {"rows.jsonl": LINES, "README.md": CARD + TOTAL % 4000})
        yield hub


@pytest.fixture
def hub(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    server.faults.clear()
    server.requests.clear()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in dict(
        ENDPOINT=server.url, HUGGINGFACE_CO_URL_TEMPLATE=template, HF_HUB_OFFLINE=False, HF_HUB_CACHE=str(tmp_path / "hub"),
        HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_XET=True,
    ).items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(client, "PAUSES", (0.01,))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "store"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    HfFileSystem.clear_instance_cache()
    close_session()
    yield server
    HfFileSystem.clear_instance_cache()
    close_session()


def loaded(name: str, **values: Any) -> data.Rows:
    given = {"DATASET_NAME": name, "STREAMING": 1, "EVAL_ROWS": 16, **values}
    return data.load(Settings.from_env({key: str(value) for key, value in given.items()}))


def held(found: data.Rows) -> list[Any]:
    assert found.held is not None
    return [found.held.rows, found.held.places]


@pytest.mark.parametrize("split", ["train", "train[0:500]", "train[1200:2300]", "train[10%:20%]", "train[-100:]"])
def test_the_same_rows_and_nothing_on_the_disk(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    streamed = loaded("org/told", DATASET_SPLIT=split)
    assert streamed.commit == hub.repos["dataset", "org/told"].branches["main"].sha
    left = [p for folder in ("hub", "home", "datasets") for p in (tmp_path / folder).rglob("*") if p.is_file()]
    assert not [p for p in left if b"because" in p.read_bytes()], left
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "other"))  # where no store has the rows
    plain = loaded("org/told", DATASET_SPLIT=split, STREAMING=0)
    assert (streamed.sha256, streamed.seen, streamed.commit) == (plain.sha256, plain.seen, plain.commit)
    assert [*streamed.places] == [*plain.places] and held(streamed) == held(plain)


def test_where_the_hub_does_not_say_how_many(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["Question"] for row in loaded("org/rows", DATASET_SPLIT="train[5:9]").rows] == ["q5", "q6", "q7", "q8"]
    for values in (dict(DATASET_SPLIT="train[:10%]"), dict(DATASET_SPLIT="train[:9]", EVAL_SPLIT="train[-9:]")):
        with pytest.raises(SettingsError, match=r"_SPLIT=train\[.*STREAMING=1 needs to know how many.*STREAMING=0"):
            loaded("org/rows", **values)
    assert loaded("org/rows", DATASET_SPLIT="train").seen == 3000 - 16
    assert "reading them once to count" in capsys.readouterr().out
    with pytest.raises(HubError, match="its card says 4000 rows, and row 3000 is the last"):
        loaded("org/wrong", DATASET_SPLIT="train")


def test_a_stop_in_the_middle_goes_on(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store, "SHARD_ROWS", 500)
    monkeypatch.setattr(checked, "BATCH", 100)
    good, seen = checked.Checked._good, list[int]()

    def stops(self: Any, file: int, number: int, line: int, row: Any) -> Any:
        seen.append(number)
        if len(seen) == 1250:
            raise KeyboardInterrupt
        return good(self, file, number, line, row)

    monkeypatch.setattr(checked.Checked, "_good", stops)
    with pytest.raises(KeyboardInterrupt):
        loaded("org/told", DATASET_SPLIT="train")
    seen.clear()
    seen.extend([0] * 2000)
    again = loaded("org/told", DATASET_SPLIT="train")
    assert seen[2000] == 1001 and again.seen == 2984
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "other"))
    assert loaded("org/told", DATASET_SPLIT="train").sha256 == again.sha256


def test_a_connection_that_breaks_loses_no_row(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = loaded("org/told", DATASET_SPLIT="train[0:2500]", EVAL_ROWS=0).sha256
    monkeypatch.setattr(store, "version", lambda: "another")

    class Broken:
        calls = 0

        @staticmethod
        def islice(*given: Any) -> Iterator[Any]:
            Broken.calls += 1
            if Broken.calls == 4:
                raise ConnectionResetError(104, "reset by peer")
            return itertools.islice(*given)

    monkeypatch.setattr(stream, "itertools", Broken)
    assert loaded("org/told", DATASET_SPLIT="train[0:2500]", EVAL_ROWS=0).sha256 == whole and Broken.calls > 5


@pytest.mark.parametrize("second", ['"7"', "7.0", '"one"', "null", "2.5", '1, "more": 2'])
def test_files_whose_types_differ_are_read_or_refused_as_a_download(hub: HubServer, second: str) -> None:
    files = {
        f"{n}.jsonl": b'{"Question": "q", "Complex_CoT": "c", "Response": %s}\n' % value
        for n, value in enumerate((b"1", second.encode()))
    }
    hub.add("dataset", "org/types", files)

    def outcome(streaming: int) -> Any:
        try:
            settings = Settings.from_env({"DATASET_NAME": "org/types", "STREAMING": str(streaming)})
            return [read.row for _, read in origin.of(settings).rows(0)]
        except SettingsError as error:
            return type(error)

    assert outcome(1) == outcome(0)


def test_a_disk_that_is_too_small_for_a_download(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk gets full, or `datasets` sees before that it will."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x.arrow")

    def foreseen(*_: Any, **__: Any) -> None:
        raise OSError("Not enough disk space. Needed: 1.00 TiB (download: 1.00 TiB, generated: 1.00 TiB")

    places = (
        (datasets.arrow_writer.ArrowWriter, "write_table", full, "disk is full"),
        (datasets.DatasetBuilder, "download_and_prepare", foreseen, "Not enough disk space. Needed: 1.00 TiB"),
    )
    for owner, name, fault, said in places:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fault)
            with pytest.raises(MachineError, match=rf"{said}.*STREAMING=1"):
                loaded("org/rows", STREAMING=0, DATASET_SPLIT="train[0:7]")


def test_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SettingsError, match="STREAMING=1 with HF_HUB_OFFLINE"):
        loaded("org/told")


def test_rows_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    loaded(str(tmp_path / "rows.jsonl"), EVAL_ROWS=0)
    assert "STREAMING=1 has no effect" in capsys.readouterr().out
