"""The machine's checks, with an nvidia-smi of our own on the PATH."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fake_machine import H100, driver
from fake_machine import smi as machine
from finetune.errors import MachineError
from finetune.machine import cuda, disk, preflight
from finetune.machine.gpus import Gpu, gpus
from finetune.run import inputs
from finetune.settings import Settings
from finetune.sources.model import Source
from finetune.weights.parameters import parameters, stated

ROOT = Path(__file__).resolve().parents[2]
T4 = "1, GPU-bb, Tesla T4, 15360, 15000, 580.159.04, 7.5"


@pytest.fixture(autouse=True)
def a_driver_that_works(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", str(driver(tmp_path_factory.getbasetemp())))


def checked(
    folder: Path, *lines: str, version: tuple[int, int] = (13, 0), monkeypatch: pytest.MonkeyPatch, **values: str
) -> list[str]:
    monkeypatch.setattr(preflight, "cuda_version", lambda: version)
    environ = machine(folder, *lines)
    settings = Settings.from_env(
        {"OUTPUT_DIR": str(folder / "out"), "SAVE_MERGED": "0", "MODEL_NAME": "org/some-100M", **values}
    )
    return inputs.look(settings, gpus(environ), environ)


def test_reads_what_nvidia_smi_says(tmp_path: Path) -> None:
    environ = machine(tmp_path, H100, T4)
    first, second = gpus(environ)
    assert first == Gpu("NVIDIA H100 80GB HBM3", 81559, 81079, "580.159.04", (9, 0))
    assert second.capability == (7, 5)


@pytest.mark.parametrize(("visible", "names"), [("1", ["Tesla T4"]), ("GPU-aa", ["NVIDIA H100 80GB HBM3"]), ("", []), ("-1", []), ("1,0", ["Tesla T4", "NVIDIA H100 80GB HBM3"]), ("1,9,0", ["Tesla T4"])])  # fmt: skip
def test_cuda_visible_devices(tmp_path: Path, visible: str, names: list[str]) -> None:
    assert [g.name for g in gpus({**machine(tmp_path, H100, T4), "CUDA_VISIBLE_DEVICES": visible})] == names


def test_no_driver_no_gpu(tmp_path: Path) -> None:
    assert gpus({"PATH": str(tmp_path)}) == []
    assert gpus(machine(tmp_path, "NVIDIA-SMI has failed because it could not talk to the driver")) == []


def test_a_missing_compiler_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    settings = Settings.from_env(
        {"OUTPUT_DIR": str(tmp_path / "out"), "SAVE_MERGED": "0", "MODEL_NAME": "org/some-100M"}
    )
    bare = {**machine(tmp_path, H100), "PATH": str(tmp_path)}
    with pytest.raises(MachineError, match="No C compiler"):
        inputs.look(settings, gpus(bare), bare)
    compiler = {**bare, "CC": "/usr/bin/gcc"}
    assert "GPU: NVIDIA H100 80GB HBM3" in inputs.look(settings, gpus(compiler), compiler)[0]


def test_an_old_driver_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = H100.replace("580.159.04", "535.104.05")
    with pytest.raises(MachineError, match=r"535\.104\.05.*CUDA 13\.0.*580.*CUDA=12\.8.*make train"):
        checked(tmp_path, old, monkeypatch=monkeypatch)
    assert checked(tmp_path, old, version=(12, 8), monkeypatch=monkeypatch)


def test_an_old_gpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match=r"Tesla V100.*7\.0"):
        checked(tmp_path, "0, GPU-cc, Tesla V100-SXM2-16GB, 16160, 16000, 580.1, 7.0", monkeypatch=monkeypatch)


def test_bfloat16_on_a_t4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="DTYPE"):
        checked(tmp_path, T4.replace("1,", "0,", 1), monkeypatch=monkeypatch, DTYPE="bfloat16")


def test_two_gpus_say_which_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("only the first" in line for line in checked(tmp_path, H100, T4, monkeypatch=monkeypatch))


@pytest.mark.parametrize(
    ("name", "count"),
    [("unsloth/DeepSeek-R1-Distill-Llama-8B", 8e9), ("Qwen/Qwen2.5-0.5B-Instruct", 5e8), ("HuggingFaceTB/SmolLM2-135M", 135e6), ("org/mixtral-8x7B-v1", None), ("org/phi-4", None), ("org/v2b-model", None)],
)  # fmt: skip
def test_parameters_as_a_name_states_them(name: str, count: float | None) -> None:
    assert stated(name) == count


def test_parameters_counted_in_a_folder(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {}, "a": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [0, 30]}, "b": {"dtype": "BF16", "shape": [], "data_offsets": [30, 32]}}).encode()  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
    assert parameters(Source("model", None, tmp_path)) == 16
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 4)
    with pytest.raises(MachineError, match="not a whole safetensors file"):
        parameters(Source("model", None, tmp_path))


def test_a_full_disk_is_found_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match=r"GB free, about .* needed"):
        checked(tmp_path, H100, monkeypatch=monkeypatch, MODEL_NAME="org/huge-90000B", SAVE_MERGED="1")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_in_the_cache_needs_no_room(tmp_path: Path, name: str) -> None:
    settings = Settings.from_env({"OUTPUT_DIR": str(tmp_path), "MODEL_NAME": "org/huge", "SAVE_MERGED": "0"})
    snapshot = tmp_path / "models--org--huge/snapshots/1"
    snapshot.mkdir(parents=True)
    there = {"HF_HUB_CACHE": str(tmp_path)}
    assert list(disk.too_small(settings, there, 10**15))
    (snapshot / name).touch()
    assert not list(disk.too_small(settings, there, 10**15))


# root may read everything, so it becomes someone else first, after the imports that need its Python
AS_ANOTHER = """
import encodings.utf_8_sig, os, sys
from finetune.run import inputs
from finetune.errors import Refusal
from finetune.settings import Settings
if os.getuid() == 0:
    os.setgid(23456), os.setuid(12345)
try:
    inputs.look(Settings.from_env(dict(word.split("=", 1) for word in sys.argv[1:])), [], {})
except Refusal as refusal:
    print(refusal)
    sys.exit(refusal.code)
"""


@pytest.mark.parametrize(
    ("closed", "setting"),
    [("model/model.safetensors", "MODEL_NAME=model"), ("model/config.json", "MODEL_NAME=model"), ("model", "MODEL_NAME=model"), ("data", "DATASET_NAME=data/rows.jsonl"), ("data/rows.jsonl", "DATASET_NAME=data/rows.jsonl"), ("data/template.txt", "PROMPT_TEMPLATE=data/template.txt")],
)  # fmt: skip
def test_what_may_not_be_read_is_named_with_its_owner_and_the_way_out(closed: str, setting: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        header = json.dumps({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
        for file, content in (("model/config.json", b"{}"), ("model/model.safetensors", struct.pack("<Q", len(header)) + header + bytes(4)), ("data/rows.jsonl", b"{}"), ("data/template.txt", b"{}")):  # fmt: skip
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)
        (folder / "out").mkdir()
        (folder / "out").chmod(0o1777)
        words = [f"OUTPUT_DIR={folder}/out", f"MODEL_NAME={folder}/model", "DATASET_NAME=samples"]
        given, _, path = setting.partition("=")
        command = [sys.executable, "-c", AS_ANOTHER, *words, f"{given}={folder}/{path}"]
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        assert subprocess.run(command, env=environ, capture_output=True).returncode == 0
        (folder / closed).chmod(0)
        refused = subprocess.run(command, env=environ, capture_output=True, text=True)
        (folder / closed).chmod(0o700)
    assert refused.returncode == MachineError.code, refused.stderr
    assert refused.stdout.startswith(f"{folder}/{closed}".replace("/data", "/data/rows.jsonl") if closed == "data" else f"{folder}/{closed}")  # fmt: skip
    uid = 12345 if os.getuid() == 0 else os.getuid()
    for text in (f"user {uid},", f"{folder}/{closed} belongs to user {os.getuid()} with mode 0000", f"chmod -R a+rX {folder}/{closed}", "--user"):  # fmt: skip
        assert text in refused.stdout, refused.stdout


def test_no_temporary_folder_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(MachineError, match=r"TMPDIR=.*--tmpfs /tmp"):
        inputs.look(Settings.from_env({}), [], {})


def test_weights_that_are_not_loaded_are_not_counted(tmp_path: Path) -> None:
    """Mistral's repositories hold them twice, and a model of 7 B would be one of 14 B, too large for the disk."""
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    whole = struct.pack("<Q", len(header)) + header + bytes(12)
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(whole)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert parameters(Source("model", None, tmp_path)) == 12
    (tmp_path / "model.safetensors").write_bytes(whole)
    assert parameters(Source("model", None, tmp_path)) == 6
    for path in tmp_path.glob("model*"):
        path.unlink()
    assert parameters(Source("model", None, tmp_path)) is None


def test_a_folder_below_the_home_is_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name it would be one of 180,000 GB."""
    monkeypatch.setenv("HOME", str(tmp_path))
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2000000], "data_offsets": [0, 4000000]}}).encode()
    (tmp_path / "huge-90000B").mkdir()
    (tmp_path / "huge-90000B" / "config.json").write_text("{}")
    (tmp_path / "huge-90000B" / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(4000000)
    )
    found = checked(tmp_path, H100, monkeypatch=monkeypatch, MODEL_NAME="~/huge-90000B", DATASET_NAME="samples")
    assert "model: ~/huge-90000B, 2 M parameters" in found
