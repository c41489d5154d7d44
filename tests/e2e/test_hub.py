"""The Hub's part of a run, with the real client against a local server that speaks the Hub's HTTP API."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import conftest
from conftest import QUICK, ROOT
from hub_server import HubServer

SAMPLES = ROOT / "finetune" / "samples"


@pytest.fixture
def hub(qwen2: Path, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("model", "org/tiny", qwen2)
        data = tmp_path / "data"
        data.mkdir()
        card = (
            "---\nconfigs:\n- config_name: zh\n  data_files: zh.jsonl\n- config_name: en\n  data_files: en.jsonl\n---\n"
        )
        (data / "README.md").write_text(card)
        for name in ("zh.jsonl", "en.jsonl"):
            (data / name).write_bytes((SAMPLES / name).read_bytes())
        server.add("dataset", "org/rows", data)
        yield server


def call(hub: HubServer, home: Path, *words: str, **values: Any) -> subprocess.CompletedProcess[str]:
    """`entrypoint.py WORDS` against `hub`, with a cache of its own."""
    ours = dict(MODEL_NAME="org/tiny", DATASET_NAME="org/rows", DATASET_CONFIG="zh", OUTPUT_DIR=home / "out")
    reach = dict(HF_HUB_OFFLINE=0, HF_ENDPOINT=hub.url, HF_HOME=home / "hf", NO_PROXY="*", no_proxy="*")
    return conftest.call(*words, **{**QUICK, **ours, **reach, **values})


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def published(hub: HubServer, name: str) -> dict[str, bytes]:
    return {path: content for path, content in hub.files("model", name).items() if path != ".gitattributes"}


def test_download_train_and_push(hub: HubServer, tmp_path: Path) -> None:
    model, rows = (
        hub.repos[kind, name].branches["main"].sha for kind, name in (("model", "org/tiny"), ("dataset", "org/rows"))
    )
    answer = call(hub, tmp_path, "train", DATASET_SPLIT="train[2:7]", HF_TOKEN="hf_write", PUSH_TO_HUB=1, HUB_MODEL_ID="tester/out", HUB_MERGED_MODEL_ID="out-merged")  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "logged in as tester; the token may read and write" in answer.stdout
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["model"]["commit"] == model and record["dataset"]["commit"] == rows
    assert record["dataset"]["seen"] == 5
    assert published(hub, "tester/out") == on_disk(tmp_path / "out" / "adapter")
    assert published(hub, "tester/out-merged") == on_disk(tmp_path / "out" / "merged")
    assert hub.repos["model", "tester/out"].private
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny" and config["revision"] == model
    assert "base_model: org/tiny" in hub.files("model", "tester/out")["README.md"].decode()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"hf_write" not in path.read_bytes(), path
    assert "hf_write" not in answer.stdout + answer.stderr


def test_a_push_that_fails_costs_nothing_and_the_next_one_goes_on(hub: HubServer, tmp_path: Path) -> None:
    hub.fail_next(r"POST .*/commit/", status=403, times=1)
    both = dict(HUB_MODEL_ID="tester/out", HUB_MERGED_MODEL_ID="tester/out-merged")
    answer = call(hub, tmp_path, "train", HF_TOKEN="hf_write", PUSH_TO_HUB=1, **both)
    assert answer.returncode == 4, answer.stdout + answer.stderr
    assert "make push-hub" in answer.stderr and "hf_write" not in answer.stderr
    assert (tmp_path / "out" / "run.json").is_file() and (tmp_path / "out" / "merged" / "model.safetensors").is_file()
    words = answer.stderr.partition("entrypoint.py ")[2].partition(" (or")[0].split()
    again = call(hub, tmp_path, *words, HF_TOKEN="hf_write", SAVE_ADAPTER=0)  # it is there, whatever a next run keeps
    assert again.returncode == 0, again.stderr
    assert "step 1/3" not in again.stdout
    assert published(hub, "tester/out") == on_disk(tmp_path / "out" / "adapter")
    assert published(hub, "tester/out-merged") == on_disk(tmp_path / "out" / "merged")
    (tmp_path / "out" / "adapter" / "adapter_config.json").write_text("{}")
    damaged = call(hub, tmp_path, "push", HF_TOKEN="hf_write", HUB_MODEL_ID="tester/out")
    assert damaged.returncode == 5 and "adapter/adapter_config.json" in damaged.stderr


def test_a_hiccup_at_the_commit_is_repeated(hub: HubServer, tmp_path: Path) -> None:
    hub.fail_next(r"POST .*/commit/", status=503, times=1)
    answer = call(hub, tmp_path, "train", HF_TOKEN="hf_write", PUSH_TO_HUB=1, HUB_MODEL_ID="tester/out")
    assert answer.returncode == 0 and "trying again" in answer.stdout, answer.stderr


def test_a_pinned_revision_is_what_is_loaded(hub: HubServer, tmp_path: Path, llama: Path) -> None:
    first = hub.repos["model", "org/tiny"].branches["main"].sha
    hub.add("model", "org/tiny", {"config.json": b"{}"})
    answer = call(hub, tmp_path, "train", MODEL_REVISION=first, SAVE_MERGED=0)
    assert answer.returncode == 0, answer.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model"]["commit"] == first


def test_lock_inputs_writes_both_commits_and_keeps_the_rest_of_the_file(hub: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    file = home / ".env"
    before = (
        "# mine\nMODEL_NAME=org/tiny\r\n\n  export MODEL_REVISION = 'main' # pinned later\nDATASET_NAME=\"org/rows\"\n"
        "NOTE='two\nDATASET_REVISION=not this\n'\nHF_TOKEN=hf_read\nLORA_R=8"
    )
    file.write_bytes(before.encode())
    file.chmod(0o640)
    model, rows = (
        hub.repos[kind, name].branches["main"].sha for kind, name in (("model", "org/tiny"), ("dataset", "org/rows"))
    )
    reach = dict(HF_HUB_OFFLINE=0, HF_ENDPOINT=hub.url, HF_HOME=tmp_path / "hf", NO_PROXY="*", no_proxy="*")
    answer = conftest.call("lock-inputs", cwd=home, **reach)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (
        f".env: MODEL_REVISION={model} (main until now), of org/tiny" in answer.stdout and "note:" not in answer.stdout
    )
    assert f".env: DATASET_REVISION={rows} (main until now), of org/rows" in answer.stdout
    after = file.read_bytes().decode()
    assert after == before.replace("'main'", f"'{model}'") + f"\r\nDATASET_REVISION={rows}\r\n"
    assert file.stat().st_mode & 0o777 == 0o640 and [p.name for p in home.iterdir()] == [".env"]

    hub.add("model", "org/tiny", {"config.json": b"{}"})  # names move on, pins do not
    again = conftest.call("lock-inputs", cwd=home, **reach)
    assert again.stdout.count("(as it was)") == 2 and file.read_bytes().decode() == after
    moved = conftest.call("lock-inputs", cwd=home, **reach, MODEL_REVISION="main")
    assert "wins over .env" in moved.stdout and model not in file.read_text() and rows in file.read_text()

    whole = file.read_bytes()
    local = conftest.call("lock-inputs", f"MODEL_NAME={home}", "DATASET_NAME=samples", cwd=home, **reach)
    assert local.returncode == 0 and local.stdout.count("has no revision") == 2
    for code, words, values in (
        (4, ["HF_HUB_OFFLINE", "MODEL_NAME=org/tiny", "DATASET_NAME=org/rows"], dict(HF_HUB_OFFLINE=1)),
        (4, ["cannot be reached"], dict(HF_ENDPOINT="http://127.0.0.1:9")),
        (2, ["MODEL_NAME=org/absent", "DATASET_NAME=org/gone"], dict(MODEL_NAME="org/absent", DATASET_NAME="org/gone")),
    ):
        refused = conftest.call("lock-inputs", cwd=home, **{**reach, **values})
        assert refused.returncode == code and "Traceback" not in refused.stderr, refused.stderr
        assert all(word in refused.stderr for word in words), refused.stderr
        assert "hf_read" not in refused.stdout + refused.stderr
    assert file.read_bytes() == whole


def test_a_pushed_run_is_reproduced_at_its_commits_from_its_record_and_not_pushed_again(
    hub: HubServer, tmp_path: Path, llama: Path
) -> None:
    """Both names have moved on since; in the end there is neither Hub nor dataset commit but in the cache."""
    push = dict(HF_TOKEN="hf_write", PUSH_TO_HUB=1, HUB_MODEL_ID="tester/out")
    answer = call(hub, tmp_path, "train", **push)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert not conftest.schema_errors(record)
    whole = {k: v.hex() for k, v in hub.files("model", "tester/out").items()}
    hub.add("model", "org/tiny", llama)
    later = hub.add("dataset", "org/rows", {"zh.jsonl": (SAMPLES / "en.jsonl").read_bytes()})
    before = len(hub.seen("POST "))
    reach = dict(HF_HUB_OFFLINE=0, HF_ENDPOINT=hub.url, NO_PROXY="*", no_proxy="*")
    command = ["reproduce", str(tmp_path / "out" / "run.json")]
    again = conftest.call(*command, **push, **reach, HF_HOME=tmp_path / "new")
    assert again.returncode == 0 and "REPRODUCED" in again.stdout, again.stdout + again.stderr
    assert not [entry for entry in hub.seen("POST ")[before:] if "commit" in entry.path or "create" in entry.path]
    assert {k: v.hex() for k, v in hub.files("model", "tester/out").items()} == whole

    offline = conftest.call(*command, HF_HOME=tmp_path / "new", OUTPUT_DIR=tmp_path / "third")
    assert offline.returncode == 0 and "complete already" in offline.stdout, offline.stdout + offline.stderr
    plain = call(hub, tmp_path, "train", HF_HUB_OFFLINE=1, OUTPUT_DIR=tmp_path / "plain", SAVE_MERGED=0)
    assert plain.returncode == 0, plain.stdout + plain.stderr
    taken = json.loads((tmp_path / "plain" / "run.json").read_text())["dataset"]["commit"]
    assert taken == record["dataset"]["commit"]  # and not the word main
    other = call(
        hub, tmp_path, "train", HF_HUB_OFFLINE=1, DATASET_REVISION=later, MODEL_REVISION=record["model"]["commit"]
    )
    assert other.returncode == 4 and f"DATASET_REVISION={later}: is not in the cache" in other.stderr, other.stderr


@pytest.mark.parametrize(
    ("values", "code", "words"),
    [
        ({"HF_TOKEN": "hf_wrong"}, 4, "HF_TOKEN: the Hub refuses this token"),
        ({"HF_TOKEN": "hf_read", "PUSH_TO_HUB": 1, "HUB_MODEL_ID": "tester/out"}, 4, "may only read"),
        ({"MODEL_NAME": "org/absent"}, 2, "MODEL_NAME=org/absent: the Hub has no such repository"),
        ({"DATASET_NAME": "org/absent"}, 2, "DATASET_NAME=org/absent: the Hub has no such repository"),
        ({"MODEL_REVISION": "v9"}, 2, "MODEL_REVISION=v9"), ({"DATASET_REVISION": "v9"}, 2, "DATASET_REVISION=v9"),
        ({"DATASET_SPLIT": "test[0:5]"}, 2, "DATASET_SPLIT=test[0:5]: org/rows has train"), ({"DATASET_CONFIG": "fr"}, 2, "DATASET_CONFIG=fr"),
        ({"COMPLETION_COLUMNS": "Answer"}, 2, "org/rows train row 1: has no column Answer"),
    ],
)  # fmt: skip
def test_refusals(hub: HubServer, tmp_path: Path, values: dict[str, Any], code: int, words: str) -> None:
    answer = call(hub, tmp_path, "train", **values)
    assert answer.returncode == code and words in answer.stderr and "Traceback" not in answer.stderr, (
        answer.stdout + answer.stderr
    )


def test_no_hub_at_all(tmp_path: Path) -> None:
    with HubServer() as gone:
        pass
    answer = call(gone, tmp_path, "train")
    assert answer.returncode == 4 and "cannot be reached" in answer.stderr and "Traceback" not in answer.stderr, (
        answer.stderr
    )


def test_a_proxy_that_cannot_be_used_is_named_and_no_password_is_shown(hub: HubServer, tmp_path: Path) -> None:
    for proxy in ("socks5://127.0.0.1:1080", "ftp://me:opensesame@127.0.0.1:1"):
        answer = call(hub, tmp_path, "lock-inputs", all_proxy=proxy, NO_PROXY="", no_proxy="")
        assert answer.returncode == 4 and "https_proxy=http://" in answer.stderr, answer.stderr
        assert "Traceback" not in answer.stderr and "opensesame" not in answer.stderr
    hub.fail_next(r".*whoami.*", status=501, times=1)
    secret = hub.url.replace("://", "://me:opensesame@")
    answer = call(hub, tmp_path, "train", HF_ENDPOINT=secret, HF_TOKEN="hf_write")
    assert answer.returncode == 4 and "HTTP 501" in answer.stderr and "opensesame" not in answer.stderr, answer.stderr


def test_asking_where_the_cache_was_emptied(hub: HubServer, tmp_path: Path) -> None:
    """The base comes down again; where it cannot, the merged weights answer, and without them it is said why."""
    assert call(hub, tmp_path, "train").returncode == 0
    shutil.rmtree(tmp_path / "hf")
    asked = call(hub, tmp_path, "ask", "What is it?", MAX_NEW_TOKENS=3)
    assert asked.returncode == 0 and "merged" not in asked.stdout, asked.stderr
    shutil.rmtree(tmp_path / "hf")
    offline = call(hub, tmp_path, "ask", "What is it?", MAX_NEW_TOKENS=3, HF_HUB_OFFLINE=1)
    assert offline.returncode == 0 and "the merged weights answer" in offline.stdout, offline.stderr
    shutil.rmtree(tmp_path / "out" / "merged")
    lost = call(hub, tmp_path, "ask", "What is it?", HF_HUB_OFFLINE=1)
    assert lost.returncode == 4 and "HF_HUB_OFFLINE" in lost.stderr and "Traceback" not in lost.stderr
