"""What goes into a run is what its names say: a damaged download, a quantised base, rows that are none, all with the real client."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import conftest
from conftest import QUICK, ROOT
from hub_server import HubServer

ROWS = (ROOT / "finetune" / "samples" / "en.jsonl").read_bytes()
ROW = b'{"Question": "q", "Complex_CoT": "c", "Response": "r"}\n'


@pytest.fixture
def hub(qwen2: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("model", "org/tiny", qwen2)
        server.add("dataset", "org/rows", {"train.jsonl": ROWS})
        yield server


def call(hub: HubServer, home: Path, *words: str, cwd: Path = ROOT, **values: Any) -> Any:
    ours = dict(MODEL_NAME="org/tiny", DATASET_NAME="org/rows", DATASET_CONFIG="", OUTPUT_DIR=home / "out")
    reach = dict(HF_HUB_OFFLINE=0, HF_ENDPOINT=hub.url, HF_HOME=home / "hf", NO_PROXY="*", no_proxy="*")
    return conftest.call(*words, cwd=cwd, **{**QUICK, **ours, **reach, **values})


@pytest.mark.parametrize(
    ("file", "at"),
    [("model.safetensors", 0.9), ("model.safetensors", 0), ("tokenizer.json", 0.5), ("config.json", 0.5)],
)
def test_a_file_with_a_flipped_bit_is_refused_and_then_comes_down_again(
    hub: HubServer, tmp_path: Path, file: str, at: float
) -> None:
    hub.flip_next(rf"GET .*/resolve/.*/{file}", at)
    answer = call(hub, tmp_path, "train", SAVE_MERGED=0)
    blob = hub.repos["model", "org/tiny"].branches["main"].files[file]
    assert answer.returncode == 4 and "Traceback" not in answer.stderr, answer.stdout + answer.stderr
    assert f"MODEL_NAME=org/tiny: {file} is not the file" in answer.stderr and blob.etag in answer.stderr
    assert "the same command downloads it again" in answer.stderr and not (tmp_path / "out" / "run.json").exists()
    again = call(hub, tmp_path, "train", SAVE_MERGED=0)
    assert again.returncode == 0, again.stdout + again.stderr
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())["model"]["files"]
    (snapshot,) = (tmp_path / "hf" / "hub" / "models--org--tiny" / "snapshots").iterdir()
    assert recorded == {name: sha256(snapshot / name) for name in recorded} and file in recorded


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_base_that_changed_in_the_cache_is_not_that_of_the_run(hub: HubServer, tmp_path: Path) -> None:
    assert call(hub, tmp_path, "train").returncode == 0
    weights = next((tmp_path / "hf").glob("hub/models--org--tiny/snapshots/*/model.safetensors")).resolve()
    whole = call(hub, tmp_path, "verify")
    assert whole.returncode == 0 and "base + adapter, rounded once" in whole.stdout, whole.stdout + whole.stderr
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    changed = call(hub, tmp_path, "verify")
    assert (
        changed.returncode == 0
        and "Not checked" in changed.stdout
        and "model.safetensors is not the file" in changed.stdout
        and "again" not in changed.stdout
    )
    assert weights.is_file()


def test_each_file_of_the_cache_is_read_once(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(hub, tmp_path, "train", SAVE_MERGED=0).returncode == 0
    from finetune import files
    from finetune.sources import blobs

    repository = tmp_path / "hf" / "hub" / "models--org--tiny"
    paths = [path.resolve() for path in repository.glob("snapshots/*/*") if path.suffix != ".py"]
    assert paths and (repository / blobs.CHECKED).is_file()
    real, read = files.sha256, list[Path]()
    monkeypatch.setattr(files, "sha256", lambda path: (read.append(path), real(path))[1])
    known = {path: blob.sha256 for path, blob in blobs.read(repository, paths).items()}
    assert not read and known == {path: sha256(path) for path in paths}
    moved = paths[0].with_name("copy")
    shutil.copyfile(paths[0], moved)
    moved.replace(paths[0])  # another inode
    (repository / blobs.CHECKED).chmod(0o444)
    assert blobs.read(repository, paths)[paths[0]].sha256 == known[paths[0]] and read == [paths[0]]
    for damaged in ("", "{", "[]", '{"a": 1}', json.dumps({p.name: {"sha256": 1} for p in paths})):
        (repository / blobs.CHECKED).unlink(missing_ok=True)
        (repository / blobs.CHECKED).write_text(damaged)
        assert {path: blob.sha256 for path, blob in blobs.read(repository, paths).items()} == known
    (repository / blobs.CHECKED).unlink()
    (repository / f"{blobs.CHECKED}.partial").mkdir()  # nothing can be written there
    read.clear()
    for _ in range(2):
        assert blobs.read(repository, paths) and not (repository / blobs.CHECKED).exists()
    assert len(read) == 2 * len(set(paths))


BNB = {"quant_method": "bitsandbytes", "_load_in_4bit": True, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTISED = [
    ("tiny-unsloth-bnb-4bit", {"quantization_config": BNB}, ["bitsandbytes nf4", "MODEL_NAME=org/tiny "]),
    ("tiny-bnb-8bit", {"quantization_config": {"load_in_8bit": True}}, ["bitsandbytes int8", "MODEL_NAME=org/tiny "]),
    ("tiny-GPTQ-Int4", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["gptq 4 bit", "MODEL_NAME=org/tiny "]),
    ("tiny-AWQ", {"text_config": {"quantization_config": {"quant_method": "awq", "bits": 4}}}, ["awq 4 bit", "MODEL_NAME=org/tiny "]),
    ("tiny-FP8-dynamic", {"compression_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}, ["compressed-tensors float-quantized", "MODEL_NAME=org/tiny "]),
    ("V3", {"quantization_config": {"quant_method": "fp8"}}, ["(fp8)", "or a 16-bit copy"]),
    ("gpt-oss-tiny", {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, ["mxfp4", "MODEL_NAME=unsloth/gpt-oss-tiny-BF16 "]),
    ("new", {"quantization_config": {"quant_method": "hqq"}}, ["(hqq)"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "words"), QUANTISED)
def test_a_quantised_base_is_refused_before_its_weights_come_down(
    hub: HubServer, tmp_path: Path, name: str, config: dict[str, Any], words: list[str]
) -> None:
    content = json.dumps({"model_type": "llama", **config})
    hub.add("model", f"org/{name}", {"config.json": content.encode(), "model.safetensors": b"x" * 99})
    loads = dict(LOAD_IN_4BIT=len(name) % 2, SAVE_MERGED=len(name) % 3 % 2)
    answer = call(hub, tmp_path, "train", MODEL_NAME=f"org/{name}", **loads)
    assert answer.returncode == 2 and all(word in answer.stderr for word in words), answer.stderr
    assert not hub.seen("GET .*safetensors") and "Traceback" not in answer.stderr and answer.stderr.count("\n") == 1
    local = tmp_path / name
    local.mkdir()
    (local / "config.json").write_text(content)
    checked = call(hub, tmp_path, "check", MODEL_NAME=local)
    assert checked.returncode == 2 and words[0] in checked.stderr and f"MODEL_NAME={local}: " in checked.stderr


def test_an_unquantised_base_with_an_empty_section_is_none(tmp_path: Path) -> None:
    from finetune.sources.model import Source
    from finetune.sources.quantised import quantised

    (tmp_path / "config.json").write_text('{"quantization_config": null, "text_config": {"compression_config": {}}}')
    assert quantised(Source("a", None, tmp_path)) is None


def test_an_existing_path_is_local_and_has_no_commit(hub: HubServer, tmp_path: Path, qwen2: Path) -> None:
    """Names that both the Hub and the folder of the call have."""
    shutil.copytree(qwen2, tmp_path / "org" / "tiny")
    (tmp_path / "org" / "rows" / "data").mkdir(parents=True)
    for name, row in (
        ("b.jsonl", "b"),
        ("a.jsonl", "a"),
        ("data/c.jsonl", "c"),
        (".hidden.jsonl", "h"),
        ("README.md", "r"),
    ):
        (tmp_path / "org" / "rows" / name).write_bytes(ROW.replace(b'"q"', f'"{row}"'.encode()) * 2)
    (tmp_path / "org" / "rows" / "dataset_infos.json").write_text("{}")
    checked = call(hub, tmp_path, "check", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    answer = call(hub, tmp_path, "train", cwd=tmp_path, SAVE_MERGED=0)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "data: org/rows: a.jsonl, b.jsonl, data/c.jsonl; left out: .hidden.jsonl (hidden)\n" in answer.stdout
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["dataset"]["commit"] is None and record["dataset"]["seen"] == 6
    assert record["model"]["commit"] is None and not hub.requests
    card = (tmp_path / "out" / "README.md").read_text()
    assert "org/rows" not in card and "org/tiny" not in card
    locked = call(hub, tmp_path, "lock-inputs", cwd=tmp_path)
    assert locked.returncode == 0 and locked.stdout.count("has no revision") == 2, locked.stdout


def test_rows_of_a_folder(tmp_path: Path) -> None:
    from finetune import data
    from finetune.errors import SettingsError
    from finetune.settings import Settings

    def load() -> data.Rows:
        return data.load(Settings.from_env({"DATASET_NAME": f"{tmp_path}/"}))

    with pytest.raises(SettingsError, match=r"the folder holds no rows; it takes .*\.jsonl.*\.parquet"):
        load()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1.jsonl").write_bytes(ROW)
    (tmp_path / "0.jsonl").write_bytes(ROW.replace(b'"r"', b"[3]"))
    with pytest.raises(SettingsError, match=rf"{tmp_path}/0\.jsonl row 1 \(line 1\): column Response is a list"):
        load()
    (tmp_path / "data" / "1.csv").write_text("Question\nq\n")
    with pytest.raises(SettingsError, match=r"rows of 2 kinds \(\.csv, \.jsonl\).* DATASET_NAME=.*/data/1\.csv"):
        load()


def test_of_a_folder_with_splits_only_train_is_trained(tmp_path: Path) -> None:
    from finetune import data
    from finetune.settings import Settings

    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "validation", "training_notes"):
        (tmp_path / f"{name}.jsonl").write_bytes(ROWS)
    found = data.load(Settings.from_env({"DATASET_NAME": str(tmp_path)}))
    assert {place.split(" row")[0].rpartition("/")[2] for place in found.places} == {
        "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl",
    }  # fmt: skip


@pytest.mark.parametrize("offline", [0, 1])
@pytest.mark.parametrize(
    ("variable", "url", "instead"),
    [
        ("DATASET_NAME", "https://hub.example/datasets/org/rows", "DATASET_NAME=org/rows"),
        ("DATASET_NAME", "https://me:opensesame@hub.example/datasets/org/rows/tree/main/data?key=opensesame", "DATASET_NAME=org/rows"),
        ("DATASET_NAME", "hf://datasets/org/rows@main/train.jsonl", "DATASET_NAME=org/rows"),
        ("DATASET_NAME", "https://files.example/a/rows.jsonl?token=opensesame", "DATASET_NAME=./rows.jsonl"),
        ("DATASET_NAME", "s3://bucket/rows", "DATASET_NAME=./rows"), ("DATASET_NAME", "file:///data/rows.jsonl", "DATASET_NAME=/data/rows.jsonl"),
        ("MODEL_NAME", "https://hub.example/org/tiny/", "MODEL_NAME=org/tiny"), ("MODEL_NAME", "https://hub.example/org/tiny/tree/main", "MODEL_NAME=org/tiny"),
    ],
)  # fmt: skip
def test_a_url_is_refused_with_what_to_give(
    hub: HubServer, tmp_path: Path, variable: str, url: str, instead: str, offline: int
) -> None:
    for verb in ("check", "lock-inputs"):
        answer = call(hub, tmp_path, verb, cwd=tmp_path, HF_HUB_OFFLINE=offline, **{variable: url})
        # where there is no Hub, the other name cannot be locked either
        assert answer.returncode == (4 if verb == "lock-inputs" and offline else 2), answer.stderr
        assert "is a URL" in answer.stderr and f"for example {instead}\n" in answer.stderr, answer.stderr
        assert "Traceback" not in answer.stderr and "opensesame" not in answer.stdout + answer.stderr
    assert not [entry for entry in hub.requests if "example" in entry.path]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.jsonl": ROW, "b.jsonl": b'{"Question": "q", "Other": 1}\n'}, ["Other", "columns"]),
        ({"a.jsonl": ROW, "b.jsonl": ROW + b"{"}, ["JSON"]),
        ({"rows.py": b"import datasets\n"}, ["rows.py"]),
        ({"README.md": b"# Rows\n"}, ["data files"]),
    ],
)  # fmt: skip
def test_a_repository_without_rows_is_refused_with_what_datasets_says(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes], words: list[str]
) -> None:
    hub.add("dataset", "org/rows", files)
    answer = call(hub, tmp_path, "train")
    assert answer.returncode == 2 and "Traceback" not in answer.stderr, answer.stderr
    assert "DATASET_NAME=org/rows: cannot be read as a data set" in answer.stderr, answer.stderr
    assert all(word in answer.stderr for word in words) and "DATASET_NAME=./rows.jsonl" in answer.stderr, answer.stderr
