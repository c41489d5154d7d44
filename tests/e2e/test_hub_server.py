"""The local Hub against the real clients. Each client is a process of its own: it reads HF_ENDPOINT when imported."""

import hashlib
import http.client
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hub_server
from hub_server import HubServer, Token

PRELUDE = """
import json
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

api = HfApi()

def attempt(call, *args, **kwargs):
    '''The name and the status of the error that a call ends in, None if it succeeds.'''
    try:
        call(*args, **kwargs)
    except Exception as error:
        response = getattr(error, "response", None)
        return [type(error).__name__, None if response is None else response.status_code]
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def client(hub: HubServer, home: Path, code: str, token: str = "") -> Any:
    """Run the code in a new interpreter and return its `result`."""
    script = f"{PRELUDE}{textwrap.dedent(code)}\nprint(json.dumps(result))"
    env = {**os.environ, **hub.env(home, token), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def safetensors(rows: int, columns: int) -> bytes:
    size = 4 * rows * columns
    tensor = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "weight": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + os.urandom(size)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def test_whoami_tells_who_and_with_what_role(hub: HubServer, tmp_path: Path) -> None:
    scopes = {"team": ("repo.content.read",), "team/model": ("repo.write",)}
    hub.tokens["hf_scoped"] = Token("tester", "fineGrained", scopes=scopes)
    result = client(
        hub,
        tmp_path,
        """
        result = {name: api.whoami(token=name) for name in ("hf_write", "hf_read", "hf_scoped")}
        result["hf_bad"] = attempt(api.whoami, token="hf_bad")
        """,
    )
    assert result.pop("hf_bad") == ["HfHubHTTPError", 401]
    assert {who["name"] for who in result.values()} == {"tester"}
    assert [org["name"] for org in result["hf_write"]["orgs"]] == ["team"]
    access = {token: who["auth"]["accessToken"] for token, who in result.items()}
    assert [access[token]["role"] for token in access] == ["write", "read", "fineGrained"]
    assert "fineGrained" not in access["hf_write"]
    scoped = access["hf_scoped"]["fineGrained"]["scoped"]
    assert {scope["entity"]["name"]: tuple(scope["permissions"]) for scope in scoped} == scopes
    assert [scope["entity"]["type"] for scope in scoped] == ["org", "model"]
    assert [entry.authorized for entry in hub.seen("/whoami-v2")] == [True, True, True, False]


def test_a_pushed_folder_comes_back_byte_for_byte(hub: HubServer, tmp_path: Path) -> None:
    files = {
        "README.md": b"---\nlicense: mit\n---\n# Model\n",
        "sub/notes \u00e9.txt": b"small",
        "empty.safetensors": b"",
        "model.safetensors": safetensors(3, 4),
        "big.json": b" " * (hub_server.LFS_SIZE + 1),
    }
    write(tmp_path / "source", files)
    result = client(
        hub,
        tmp_path,
        """
        name = "team/pushed"
        url = api.create_repo(name, private=True)
        first = api.upload_folder(repo_id=name, folder_path="source", commit_message="Push")
        again = api.upload_folder(repo_id=name, folder_path="source")
        folder = Path(snapshot_download(name))
        found = [path for path in folder.rglob("*") if path.is_file()]
        info = api.model_info(name, files_metadata=True)
        result = {
            "url": [url.repo_type, url.repo_id],
            "created twice": attempt(api.create_repo, name),
            "allowed twice": api.create_repo(name, exist_ok=True).repo_id,
            "commits": [first.oid, again.oid, info.sha, folder.name],
            "files": {path.relative_to(folder).as_posix(): path.read_bytes().hex() for path in found},
            "lfs": sorted(file.rfilename for file in info.siblings if file.lfs),
            "private": info.private,
            "parameters": api.model_info(name, expand=["safetensors"]).safetensors.total,
            "scanned": api.model_info(name, securityStatus=True).security_repo_status["scansDone"],
            "tree": [entry.path for entry in api.list_repo_tree(name)],
            "sub": [entry.path for entry in api.list_repo_tree(name, "sub")],
            "paths": [entry.path for entry in api.get_paths_info(name, ["sub", "model.safetensors", "none"])],
            "branches": [[branch.name, branch.target_commit] for branch in api.list_repo_refs(name).branches],
        }
        api.delete_file("big.json", name)
        push = {"path_or_fileobj": b"new", "path_in_repo": "sub/new.txt", "repo_id": name}
        result["stale"] = attempt(api.upload_file, **push, parent_commit=first.oid)
        api.upload_file(**push)
        """,
        token="hf_write",
    )
    assert result["url"] == ["model", "team/pushed"]
    assert result["created twice"] == ["HfHubHTTPError", 409]
    assert result["allowed twice"] == "team/pushed"
    sha = result["commits"][0]
    assert result["commits"] == [sha] * 4  # the second push changed nothing and made no commit
    downloaded = {path: bytes.fromhex(data) for path, data in result["files"].items()}
    assert downloaded == hub.files("model", "team/pushed", sha)
    assert downloaded == {**files, ".gitattributes": downloaded[".gitattributes"]}
    assert result["lfs"] == ["big.json", "model.safetensors"]
    assert result["private"] is True
    assert result["parameters"] == 3 * 4
    assert result["scanned"] is True
    assert result["tree"] == sorted({path.partition("/")[0] for path in downloaded})
    assert result["sub"] == ["sub/notes \u00e9.txt"]
    assert result["paths"] == ["sub", "model.safetensors"]
    assert result["branches"] == [["main", sha]]
    assert result["stale"] == ["HfHubHTTPError", 412]
    assert hub.files("model", "team/pushed").keys() == downloaded.keys() - {"big.json"} | {"sub/new.txt"}
    titles = [commit.title for commit in hub.repos["model", "team/pushed"].commits.values()]
    assert titles[:2] == ["initial commit", "Push"]
    assert hub.seen("PUT /_upload/")
    assert not any(entry.authorized for entry in hub.seen("PUT /_upload/"))  # storage never sees the token


def test_only_a_token_that_may_write_can_push(hub: HubServer, tmp_path: Path) -> None:
    hub.add("model", "tester/open", {"config.json": b"{}"})
    hub.tokens["hf_scoped"] = Token("tester", "fineGrained", scopes={"tester/open": ("repo.write",)})
    result = client(
        hub,
        tmp_path,
        """
        def push(token, name="tester/open"):
            return attempt(api.upload_file, path_or_fileobj=b"1", path_in_repo="f.txt", repo_id=name, token=token)

        refused = ("hf_read", "hf_stranger", False)
        result = {
            "create": [attempt(api.create_repo, "tester/new", token=token) for token in (*refused, "hf_scoped")],
            "push": [push(token) for token in (*refused, "hf_scoped", "hf_fine")],
            "absent": push("hf_write", "tester/absent"),
            "exists": api.create_repo("tester/open", token="hf_read", exist_ok=True).repo_id,
        }
        """,
    )
    refused, anonymous = ["HfHubHTTPError", 403], ["HfHubHTTPError", 401]
    assert result["create"] == [refused, refused, anonymous, refused]
    assert result["push"] == [refused, refused, anonymous, None, None]
    assert result["absent"] == ["RepositoryNotFoundError", 404]
    assert result["exists"] == "tester/open"  # so exist_ok is no proof that the token may write
    assert ("model", "tester/new") not in hub.repos


def test_an_older_revision_stays_what_it_was(hub: HubServer, tmp_path: Path) -> None:
    old = hub.add("model", "tester/moving", write(tmp_path / "seed", {"config.json": b"old", ".git/HEAD": b""}))
    new = hub.add("model", "tester/moving", {"config.json": b"new"})
    side = hub.add("model", "tester/moving", {"config.json": b"side"}, branch="refs/pr/1")
    result = client(
        hub,
        tmp_path,
        f"""
        def read(revision):
            path = Path(hf_hub_download("tester/moving", "config.json", revision=revision))
            return [path.read_text(), path.parent.name]

        result = [read("{old}"), read("main"), read("refs/pr/1"), api.model_info("tester/moving", revision="{old}").sha]
        """,
    )
    assert result == [["old", old], ["new", new], ["side", side], old]
    assert hub.files("model", "tester/moving", old) == {"config.json": b"old"}


def test_what_is_absent_or_forbidden_has_its_own_error(hub: HubServer, tmp_path: Path) -> None:
    hub.add("model", "tester/open", {"config.json": b"{}"})
    hub.add("model", "tester/secret", {"config.json": b"{}"}, private=True)
    hub.add("model", "vendor/gated", {"config.json": b"{}"}, gated="manual", granted={"stranger"})
    hub.tokens["hf_unticked"] = Token("stranger", "fineGrained", reads_gated=False)
    result = client(
        hub,
        tmp_path,
        """
        def get(name, token=False, file="config.json", revision=None):
            return attempt(hf_hub_download, name, file, token=token, revision=revision)

        result = {
            "repo": [get("tester/none"), get("tester/none", "hf_read"), attempt(snapshot_download, "tester/none")],
            "revision": [get("tester/open", revision=revision) for revision in ("v9", "0" * 40)],
            "file": [get("tester/open", file="none.json"), get("tester/open", "hf_read", file="none.json")],
            "bad token": [get("tester/open", "hf_bad"), attempt(api.model_info, "tester/open", token="hf_bad")],
            "private": [get("tester/secret", token) for token in (False, "hf_stranger", "hf_read")],
            "gated": [get("vendor/gated", token) for token in (False, "hf_write", "hf_unticked", "hf_stranger")],
            "gated info": api.model_info("vendor/gated").gated,
            "not spoken": attempt(api.list_repo_commits, "tester/open"),
        }
        """,
    )
    no_repo, no_revision, no_file = (f"{name}NotFoundError" for name in ("Repository", "Revision", "RemoteEntry"))
    assert result["repo"] == [[no_repo, 401], [no_repo, 404], [no_repo, 401]]
    assert result["revision"] == [[no_revision, 404]] * 2
    assert result["file"] == [[no_file, 404]] * 2
    assert result["bad token"] == [["HfHubHTTPError", 401]] * 2
    assert result["private"] == [[no_repo, 401], [no_repo, 404], None]
    # the client takes a 403 without a code for a Hub that is down; what the Hub said is in __cause__
    unticked = ["LocalEntryNotFoundError", None]
    assert result["gated"] == [["GatedRepoError", 401], ["GatedRepoError", 403], unticked, None]
    assert result["gated info"] == "manual"
    assert result["not spoken"] == ["HfHubHTTPError", 501]


def test_load_dataset_by_config_split_and_revision(hub: HubServer, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def rows(*texts: str) -> bytes:
        return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()

    readme = """\
        ---
        configs:
        - config_name: en
          data_files:
          - {split: train, path: en/train.jsonl}
          - {split: test, path: en/test.jsonl}
        - config_name: zh
          data_files: zh/*.jsonl
        ---
        """
    files = {
        "README.md": textwrap.dedent(readme).encode(),
        "en/train.jsonl": rows("a", "b"),
        "en/test.jsonl": rows("t"),
        "zh/one.jsonl": rows("\u4e00"),
    }
    old = hub.add("dataset", "tester/rows", files)
    new = hub.add("dataset", "tester/rows", {**files, "en/train.jsonl": rows("c")})
    table = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": ["p", "q"]}), table)
    plain = {"data/train-00000-of-00001.parquet": table.getvalue().to_pybytes()}
    hub.add("dataset", "tester/plain", plain, private=True)
    result = client(
        hub,
        tmp_path,
        f"""
        from datasets import load_dataset

        def texts(*args, **kwargs):
            return load_dataset(*args, **kwargs)["text"][:]

        result = {{
            "new": texts("tester/rows", "en", split="train"),
            "old": texts("tester/rows", "en", split="train", revision="{old}"),
            "slice": texts("tester/rows", "en", split="test[:1]"),
            "zh": texts("tester/rows", "zh", split="train"),
            "plain": texts("tester/plain", split="train"),
            "no config": attempt(load_dataset, "tester/rows", "fr"),
            "no repo": attempt(load_dataset, "tester/none"),
            "sha": api.dataset_info("tester/rows").sha,
        }}
        """,
        token="hf_read",
    )
    assert result == {
        "new": ["c"],
        "old": ["a", "b"],
        "slice": ["t"],
        "zh": ["\u4e00"],
        "plain": ["p", "q"],
        "no config": ["ValueError", None],
        "no repo": ["DatasetNotFoundError", None],
        "sha": new,
    }


def test_transformers_reads_a_tokenizer_and_a_config(hub: HubServer, tmp_path: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"[UNK]": 0, "hello": 1, "world": 2}, "unk_token": "[UNK]"}
    unset = dict.fromkeys(["truncation", "padding", "normalizer", "post_processor", "decoder"])
    split = {"added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}}
    files = {
        "config.json": {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2},
        "tokenizer.json": {"version": "1.0", **unset, **split, "model": words},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"},
    }
    tiny = {path: json.dumps(content).encode() for path, content in files.items()}
    sha = hub.add("model", "tester/tiny", tiny, private=True)
    result = client(
        hub,
        tmp_path,
        """
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained("tester/tiny")
        tokenizer = AutoTokenizer.from_pretrained("tester/tiny")
        result = [config.hidden_size, config._commit_hash, tokenizer("hello world").input_ids]
        """,
        token="hf_read",
    )
    assert result == [16, sha, [1, 2]]


def test_a_fault_and_what_the_client_makes_of_it(hub: HubServer, tmp_path: Path) -> None:
    weights = safetensors(2048, 2048)
    hub.add("model", "tester/shaky", {"model.safetensors": weights, "config.json": b"{}"})
    hub.cut_next("GET .*/model.safetensors", after=12 << 20)  # the client keeps what it got in steps of 10 MiB
    hub.fail_next("HEAD .*/config.json", 503)
    hub.fail_next("POST .*/preupload/", 502)
    hub.cut_next("PUT /_upload/")
    hub.fail_next("POST .*/commit/", 503)
    result = client(
        hub,
        tmp_path,
        """
        from hashlib import sha256

        data = Path(hf_hub_download("tester/shaky", "model.safetensors")).read_bytes()
        hf_hub_download("tester/shaky", "config.json")
        push = {"path_or_fileobj": data[:-8], "path_in_repo": "new.safetensors", "repo_id": "tester/shaky"}
        result = [sha256(data).hexdigest(), attempt(api.upload_file, **push), attempt(api.upload_file, **push)]
        """,
        token="hf_write",
    )
    assert result[0] == hashlib.sha256(weights).hexdigest()
    assert [entry.status for entry in hub.seen("GET .*/model.safetensors")] == [200, 206]
    assert [entry.status for entry in hub.seen("HEAD .*/config.json")] == [503, 200]
    assert [entry.status for entry in hub.seen("/preupload/")] == [502, 200, 200]
    # every step is repeated but the commit itself; pushed again, the content is there already
    assert result[1:] == [["HfHubHTTPError", 503], None]
    assert [entry.status for entry in hub.seen("PUT /_upload/")] == [0, 200]
    assert hub.files("model", "tester/shaky")["new.safetensors"] == weights[:-8]


def test_served_by_hand(tmp_path: Path) -> None:
    folder = write(tmp_path / "seed", {"config.json": b"{}"})
    command = [sys.executable, hub_server.__file__, "--port", "0", "--seed", f"model:tester/tiny:{folder}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout
            assert server.stdout.readline().startswith("model tester/tiny ")
            address = server.stdout.readline().split()[1].partition("//")[2]
            connection = http.client.HTTPConnection(address, timeout=10)
            connection.request("GET", "/tester/tiny/resolve/main/config.json", headers={"Range": "bytes=-1"})
            assert connection.getresponse().read() == b"}"
            connection.close()
        finally:
            server.terminate()
