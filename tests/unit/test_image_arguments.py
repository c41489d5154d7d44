"""What the scripts hand to the build, from a repository made for the test."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from finetune.machine import preflight

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A commit with the files that the script reads."""
    for name in (
        "scripts/image_arguments.sh",
        "pyproject.toml",
        "docker/Dockerfile",
        "docker/requirements.txt",
        "docker/requirements-cu128.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first")
    return tmp_path


def git(folder: Path, *words: str) -> str:
    """git, with nothing of this machine's settings."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    return subprocess.run(
        ["git", *words], cwd=folder, env=environ, check=True, capture_output=True, text=True
    ).stdout.strip()


def arguments(folder: Path, **environ: str) -> dict[str, str]:
    """The build arguments by name."""
    script = ". scripts/image_arguments.sh; printf '%s\\n' \"${arguments[@]}\""
    own = {"PATH": os.environ["PATH"], "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1", **environ}
    done = subprocess.run(["bash", "-euc", script], cwd=folder, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if line != "--build-arg")


def test_a_clean_tree_gives_its_commit_and_its_time(repository: Path) -> None:
    found = arguments(repository)
    assert found["REVISION"] == git(repository, "rev-parse", "HEAD")
    assert found["SOURCE_DATE_EPOCH"] == git(repository, "log", "-1", "--format=%ct")


@pytest.mark.parametrize("change", ["pyproject.toml", "docker/new.txt"])
def test_a_change_that_no_commit_holds_makes_it_dirty(repository: Path, change: str) -> None:
    with (repository / change).open("a") as stream:
        stream.write("\n")
    assert arguments(repository)["REVISION"] == git(repository, "rev-parse", "HEAD") + "-dirty"


@pytest.mark.parametrize(
    ("remote", "source"),
    [
        ("https://example.org/a/b.git", "https://example.org/a/b.git"),
        ("https://me:secret@example.org/a/b.git", ""),
        ("/home/me/b", ""),
        ("git@example.org:a/b.git", ""),
    ],
)
def test_the_source_is_an_address_without_a_token(repository: Path, remote: str, source: str) -> None:
    git(repository, "remote", "add", "origin", remote)
    assert arguments(repository)["SOURCE"] == source


@pytest.mark.parametrize(("cuda", "lock"), [("13.0", "requirements.txt"), ("12.8", "requirements-cu128.txt")])
def test_each_cuda_has_its_base_and_lock(repository: Path, cuda: str, lock: str) -> None:
    found = arguments(repository, CUDA=cuda)
    assert found["LOCK"] == lock and f"cuda:{cuda}" in found["BASE"] and "@sha256:" in found["BASE"]
    assert arguments(repository, CUDA=cuda, BASE="another")["BASE"] == "another"


def test_bootstrap_knows_the_driver_that_the_program_asks_for() -> None:
    line = next(line for line in (ROOT / "scripts/bootstrap.sh").read_text().splitlines() if line.startswith("NEEDED="))
    done = subprocess.run(["bash", "-euc", f"{line}; echo $NEEDED"], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) == preflight.DRIVERS[13]
