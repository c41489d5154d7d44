"""A disk that fills up, at whatever stage: a sentence, exit code 3, nothing half-written under a final name. With room it goes on.

The sizes go from too small for anything to nearly enough, so that each stage is met. Where nothing may be mounted, a limit on
the size of files (ulimit -f) stands in for the small disk.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import entrypoint
from conftest import QUICK, environment
from finetune import console, files
from finetune.training import checkpoints

VALUES = {**QUICK, "MAX_STEPS": 2, "SAVE_STEPS": 1, "MAX_SEQ_LENGTH": 64}
Mount = Callable[[str], Path]
Train = Callable[[Path], tuple[int, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So small that hundreds of kilobytes hold a run."""
    import tiny

    return tiny.model(tmp_path_factory.mktemp("base"), "llama", shards=True)


@pytest.fixture
def train(base: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Train]:
    """Train into a folder, in this process: exit code, and all that was said."""
    kept, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)

    def run(output: Path) -> tuple[int, str]:
        values = {**VALUES, "MODEL_NAME": base, "OUTPUT_DIR": output, "FINETUNE_STATE_DIR": tmp_path / "state"}
        code = entrypoint.main(["train"], environment(**values))
        said = capfd.readouterr()
        assert "Traceback" not in said.out + said.err, said.out + said.err
        return code, said.out + said.err

    yield run
    os.environ.clear()
    os.environ.update(kept)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def weights(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """sha256 of what an undisturbed run leaves."""
    import conftest

    output = tmp_path_factory.mktemp("undisturbed") / "out"
    conftest.train(base, output, **VALUES)
    return {
        name: sha
        for name, sha in files.digests(output).items()
        if name.endswith(".safetensors") and "check" not in name
    }


def whole(output: Path, weights: dict[str, str]) -> None:
    """What has its final name is complete."""
    for name, sha in weights.items():
        if (output / name).parent.is_dir() and "checkpoints" not in name:
            assert files.sha256(output / name) == sha, name
    for folder in checkpoints.folders(output / "checkpoints"):
        expected = json.loads((folder / "sha256.json").read_bytes())
        assert files.digests(folder, expected) == expected
    if (output / "run.json").exists():
        json.loads((output / "run.json").read_bytes())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small disk of its own, which can be made larger."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        remount = "remount," if os.path.ismount(place) else ""
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", remount + options, "none", place], capture_output=True)
        if done.returncode:
            pytest.skip(f"nothing may be mounted here: {done.stderr.decode().strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "-l", place], check=True)


STAGES = [("loading", 0), ("training", 0), ("training", 700), ("saving", 0), ("saving", 300)]


@pytest.mark.parametrize(("stage", "left"), STAGES)
def test_a_disk_that_fills_up(
    train: Train, disk: Mount, weights: dict[str, str], monkeypatch: pytest.MonkeyPatch, stage: str, left: int
) -> None:
    """left: KiB that the stage still has when it begins."""
    place, phase = disk("size=700m"), console.phase

    def filling(name: str, line: str) -> None:
        phase(name, line)
        if name == stage:
            with open(place / "other", "wb") as other:
                os.posix_fallocate(other.fileno(), 0, shutil.disk_usage(place).free - left * 1024)

    with monkeypatch.context() as patched:
        patched.setattr(console, "phase", filling)
        code, said = train(place / "out")
    assert code == 3 and "the disk is full" in said, said
    whole(place / "out", weights)
    (place / "other").unlink()
    code, said = train(place / "out")
    assert code == 0, said
    assert {name: files.sha256(place / "out" / name) for name in weights} == weights


@pytest.mark.parametrize("count", [4, 24, 44])
def test_a_disk_without_room_for_more_files(train: Train, disk: Mount, weights: dict[str, str], count: int) -> None:
    output = disk(f"size=700m,nr_inodes={count}") / "out"
    code, said = train(output)
    assert code == 3, said
    whole(output, weights)
    disk("size=700m,nr_inodes=10000")
    code, said = train(output)
    assert code == 0, said
    assert {name: files.sha256(output / name) for name in weights} == weights


@pytest.mark.parametrize("size", [1000, 150_000])
def test_files_that_may_not_grow(train: Train, tmp_path: Path, weights: dict[str, str], size: int) -> None:
    output, (soft, hard) = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python has it when it starts
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        code, said = train(output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, kept)
    assert code == 3 and "ulimit -f" in said, said
    whole(output, weights)
    code, said = train(output)
    assert code == 0, said
    assert {name: files.sha256(output / name) for name in weights} == weights
