"""Each fault of the Hub against the real client: a sentence, the right exit code, in seconds, and nothing lost.

The entrypoint runs in this process, and the client is told where the server is, as HF_ENDPOINT would tell it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http, close_session

import entrypoint
from conftest import QUICK, environment
from finetune import files
from finetune.errors import HubError
from finetune.settings import Settings
from finetune.sources import client, huggingface, session
from hub_server import PORTAL, HubServer

Answer = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def server(llama: Path) -> Iterator[HubServer]:
    with HubServer(quiet=True) as hub:
        hub.add("model", "org/tiny", llama)
        hub.add("dataset", "org/rows", {"rows.jsonl": b'{"Question": "a", "Complex_CoT": "b", "Response": "c"}\n' * 4})
        yield hub


@pytest.fixture
def hub(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The server, its faults forgotten, and the client of this process pointed at it, with short pauses."""
    server.faults.clear()
    server.requests.clear()
    server.uploads.clear()
    for name in [name for name in server.repos if name[1].startswith("tester/")]:
        del server.repos[name]
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    for name, value in dict(
        HF_HUB_OFFLINE=False, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_DISABLE_XET=True, HF_HUB_DOWNLOAD_TIMEOUT=0.5,
        HF_HUB_ETAG_TIMEOUT=0.5, HF_HUB_DISABLE_PROGRESS_BARS=True,
    ).items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    for call in (_http.http_backoff, _http.http_stream_backoff.__wrapped__):
        monkeypatch.setitem(call.__kwdefaults__, "base_wait_time", 0.01)
        monkeypatch.setitem(call.__kwdefaults__, "max_wait_time", 0.02)
    monkeypatch.setattr(file_download, "time", types.SimpleNamespace(sleep=lambda _: None, time=time.time))
    monkeypatch.setattr(session, "ANSWER", 0.5)
    monkeypatch.setattr(session, "QUIET", 0.2)
    monkeypatch.setattr(client, "PAUSES", (0.01,))
    close_session()
    kept, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    os.environ.update(NO_PROXY="*", no_proxy="*")
    yield server
    close_session()
    os.environ.clear()
    os.environ.update(kept)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def answer(hub: HubServer, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Answer:
    """Run the entrypoint: exit code, and all that it said."""

    def run(*words: str, **values: Any) -> tuple[int, str]:
        place = {"HF_HOME": tmp_path / "hf", "FINETUNE_STATE_DIR": tmp_path / "state", "HF_HUB_OFFLINE": "0"}
        code = entrypoint.main([*words], environment(**{**place, "HF_TOKEN": "hf_write", **values}))
        said = capfd.readouterr()
        assert "Traceback" not in said.out + said.err, said.out + said.err
        assert "hf_write" not in said.out + said.err
        return code, said.out + said.err

    return run


WHOAMI, CREATE, PREUPLOAD, YAML = "whoami", "POST /api/repos/create", "preupload", "validate-yaml"
BATCH, PUT, VERIFY, COMMIT = "objects/batch", "PUT ", "lfs/verify", "POST .*/commit/"
UPLOAD = (CREATE, YAML, PREUPLOAD, BATCH, PUT, VERIFY, COMMIT)
STATUSES = (401, 403, 404, 409, 412, 413, 500, 503)


def push(answer: Answer, finished: Path) -> tuple[int, str]:
    before = files.digests(finished)
    code, said = answer("push", OUTPUT_DIR=finished, HUB_MODEL_ID="tester/out")
    assert files.digests(finished) == before
    return code, said


def kept(said: str, finished: Path) -> None:
    """A refused upload says that nothing is lost, and how to go on."""
    assert f"Everything is still in {finished}" in said and "push HUB_MODEL_ID=tester/out" in said, said


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("request_", UPLOAD)
def test_an_upload_that_is_refused(hub: HubServer, answer: Answer, finished: Path, request_: str, status: int) -> None:
    hub.fault(request_, status=status, times=40)
    code, said = push(answer, finished)
    if request_ == VERIFY and status in (500, 503):
        assert code == 0, said  # asked once more, the Hub finds that it has the file
        return
    assert code == 4, said
    kept(said, finished)
    assert f"HTTP {status}" in said or status in (401, 404, 409), said
    assert ("try again" in said) == (status in (500, 503)), said


@pytest.mark.parametrize("status", [503, 429])
@pytest.mark.parametrize("request_", [WHOAMI, *UPLOAD])
def test_one_hiccup_of_an_upload_is_repeated(
    hub: HubServer, answer: Answer, finished: Path, request_: str, status: int
) -> None:
    hub.fault(request_, status=status)
    code, said = push(answer, finished)
    assert code == 0, said
    assert hub.files("model", "tester/out")["adapter_config.json"]


@pytest.mark.parametrize("request_", [WHOAMI, *UPLOAD])
def test_a_reset_of_an_upload(hub: HubServer, answer: Answer, finished: Path, request_: str) -> None:
    hub.fault(request_, reset=True)
    assert push(answer, finished)[0] == 0
    hub.repos.pop(("model", "tester/out"))
    hub.uploads.clear()
    hub.fault(request_, reset=True, times=40)
    code, said = push(answer, finished)
    assert (code == 4 and "reached" in said) or request_ == VERIFY, said


@pytest.mark.parametrize("request_", [WHOAMI, *UPLOAD])
def test_a_stall_of_an_upload(hub: HubServer, answer: Answer, finished: Path, request_: str) -> None:
    hub.fault(request_, stall=60, times=40)
    code, said = push(answer, finished)
    assert code == 4 and "no answer" in said, said


@pytest.mark.parametrize("request_", [WHOAMI, *UPLOAD])
@pytest.mark.parametrize("body", ["portal", b"[]", b'{"x": '])
def test_an_upload_is_answered_with_something_else(
    hub: HubServer, answer: Answer, finished: Path, request_: str, body: str | bytes
) -> None:
    hub.fault(request_, times=40, **(PORTAL if body == "portal" else dict(body=body)))
    code, said = push(answer, finished)
    if request_ in (PUT, VERIFY, YAML) and body != "portal":
        assert code in (0, 4), said  # the client does not read these answers
    else:
        assert code == 4, said


def fetch(answer: Answer, tmp_path: Path, **values: Any) -> tuple[int, str]:
    return answer(
        "train",
        **{**QUICK, "MODEL_NAME": "org/tiny", "OUTPUT_DIR": tmp_path / "out", "HF_TOKEN": "", **values},
    )


HEAD, CONFIG, TREE, WEIGHTS = "HEAD .*/config.json", "GET .*/config.json", "/tree/", "GET .*safetensors"
DOWNLOAD = (HEAD, CONFIG, TREE, WEIGHTS)
DISTURBED: dict[str, dict[str, Any]] = {
    "reset": dict(reset=True), "stall": dict(stall=60), "portal": PORTAL, "empty object": dict(body=b"{}"),
    "no JSON": dict(body=b'{"x": '), "shorter": dict(after=100, announced=100),
}  # fmt: skip


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("request_", DOWNLOAD)
def test_a_download_that_is_refused(hub: HubServer, answer: Answer, tmp_path: Path, request_: str, status: int) -> None:
    hub.fault(request_, status=status, times=40)
    code, said = fetch(answer, tmp_path)
    assert code == 4 and "MODEL_NAME=org/tiny" in said, said
    assert ("try again" in said) == (status in (500, 503)), said


@pytest.mark.parametrize(
    ("what", "request_"),
    [(what, each) for each in DOWNLOAD for what in DISTURBED if each != HEAD or "body" not in DISTURBED[what]],
)
def test_a_download_that_is_disturbed(hub: HubServer, answer: Answer, tmp_path: Path, request_: str, what: str) -> None:
    hub.fault(request_, times=40, **DISTURBED[what])
    code, said = fetch(answer, tmp_path)
    no_files = what == "empty object" and request_ == TREE  # then there are no weights in it
    assert code == (2 if no_files else 4) and "MODEL_NAME=org/tiny" in said, said
    if what == "stall":
        assert "does not answer" in said, said


@pytest.mark.parametrize("place", range(10))
def test_a_download_that_is_cut_goes_on(hub: HubServer, answer: Answer, tmp_path: Path, place: int) -> None:
    """At ten places of the largest file; what comes out is what the Hub has."""
    size = max(len(data) for name, data in hub.files("model", "org/tiny").items() if name.endswith(".safetensors"))
    hub.fault(WEIGHTS, cut=True, after=place * size // 10)
    settings = Settings.from_env({"MODEL_NAME": "org/tiny"})
    found = huggingface.fetch(settings)
    assert found.digests == {
        name: hashlib.sha256(data).hexdigest()
        for name, data in hub.files("model", "org/tiny").items()
        if name in found.digests
    }


def test_a_dataset_that_is_disturbed(
    hub: HubServer, answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the commit, at the list of files, at the rows: with the real `datasets`."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = dict(DATASET_NAME="org/rows", DATASET_CONFIG="", DATASET_SPLIT="train")
    for request_ in ("api/datasets/org/rows/revision", "datasets/org/rows/(tree|paths-info)", "GET .*rows.jsonl"):
        for what in (dict(status=503), dict(status=403), dict(reset=True), PORTAL, dict(body=b"[")):
            hub.faults.clear()
            hub.fault(request_, times=60, **what)
            code, said = fetch(answer, tmp_path, **rows)
            assert code in (2, 4) and "DATASET_NAME=org/rows" in said, (request_, what, said)


def test_a_flipped_bit_of_a_download(hub: HubServer, answer: Answer, tmp_path: Path) -> None:
    hub.fault(WEIGHTS, flip=0.5)
    code, said = fetch(answer, tmp_path)
    assert code == 4 and "is not the file that the Hub has" in said, said


def test_the_time_that_a_busy_hub_asks_to_wait(hub: HubServer, answer: Answer, finished: Path) -> None:
    hub.fault(CREATE, status=429, headers={"Retry-After": "1"})
    assert push(answer, finished)[0] == 0
    hub.fault(COMMIT, status=429, headers={"Retry-After": "3600"})
    hub.fault(PREUPLOAD, status=429, headers={"Retry-After": "3600"}, times=3)
    code, said = push(answer, finished)
    assert code == 4 and "asks to wait 3600 s" in said, said
    kept(said, finished)


def test_a_token_and_no_network(
    hub: HubServer, answer: Answer, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All local: nobody is asked. All in the cache: the token is not checked, which is said, and the run goes on."""
    once = dict(HF_TOKEN="hf_write", MAX_STEPS=1)
    code, said = fetch(answer, tmp_path, MODEL_NAME=llama, OUTPUT_DIR=tmp_path / "local", **once)
    assert code == 0 and not hub.requests and "Hub" not in said, said
    huggingface.fetch(Settings.from_env({"MODEL_NAME": "org/tiny"}))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    nowhere = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    code, said = fetch(answer, tmp_path, **once)
    assert code == 0 and "the token is not checked" in said, said
    shutil.rmtree(tmp_path / "hub")
    code, said = fetch(answer, tmp_path, **once)
    assert code == 4 and "HF_HUB_OFFLINE=1" in said and "HF_ENDPOINT" in said, said


def test_a_bug_of_ours_is_none_of_the_hubs() -> None:
    """What our own code raises behind the border goes through as it is."""
    with pytest.raises(AttributeError):
        client.talk("MODEL_NAME", "org/tiny", lambda: huggingface.may_write({"auth": "no object"}))


def test_offline_no_connection_breaks_off(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and it is not in the cache"):
        huggingface.fetch(Settings.from_env({"MODEL_NAME": "org/tiny"}))
    assert not hub.requests and not capsys.readouterr().out
