"""The caches' places, by a process of its own that may write nowhere but where the test says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.environment import CACHES, layered, variables
from finetune.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
# root may write everywhere, so it becomes someone else first, after the imports that need its Python
SCRIPT = """
import json, os, sys
from finetune import environment as libraries
from finetune.errors import Refusal
from finetune.settings import Settings
environ = json.loads(sys.argv[1])
if os.getuid() == 0:
    os.setgid(23456), os.setuid(12345)
try:
    print(json.dumps(libraries.variables(Settings.from_env({}), environ)))
except Refusal as refusal:
    sys.exit(str(refusal))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everyone may enter, for a folder `open` to all and one `closed` to all but root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part, mode in (("open", 0o1777), ("closed", 0o500), ("tmp", 0o1777)):
            (folder / part).mkdir()
            (folder / part).chmod(mode)
        yield folder


def resolved(place: Path, **environ: Path | str) -> tuple[list[str], dict[str, str]]:
    """(lines said, variables) for a user with this environment."""
    command = [sys.executable, "-c", SCRIPT, json.dumps({k: str(v) for k, v in environ.items()})]
    own = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(place / "tmp")}
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=True)
    *said, last = done.stdout.splitlines()
    return said, json.loads(last)


def test_a_writable_home_holds_every_cache(place: Path) -> None:
    said, variables = resolved(place, HOME=place / "open")
    assert not said
    assert variables["HOME"] == str(place / "open")
    assert all(variables[name].startswith(f"{place}/open/.cache") for name in CACHES if name != "HOME")
    assert variables["HF_HOME"] == f"{place}/open/.cache/huggingface"  # the library's own place


def test_a_cache_named_by_the_user_stays(place: Path) -> None:
    named = {name: place / "open" / name.lower() for name in CACHES}
    said, variables = resolved(place, **named)
    assert not said and {name: variables[name] for name in CACHES} == {k: str(v) for k, v in named.items()}


@pytest.mark.parametrize("home", ["closed", "closed/deeper", "no/such/folder", None])
def test_a_home_that_is_closed_or_missing_is_replaced_by_one_line(place: Path, home: str | None) -> None:
    said, variables = resolved(place, **({} if home is None else {"HOME": place / home}))
    assert len(said) == 1 and said[0].startswith(
        f"caches: {', '.join(CACHES)} cannot be written and go to {place}/tmp/"
    )
    temporary = Path(variables["HOME"])
    assert temporary.parent == place / "tmp" and temporary.stat().st_mode & 0o777 == 0o700
    assert all(Path(variables[name]).is_relative_to(temporary) for name in CACHES)


def test_only_what_is_closed_moves(place: Path) -> None:
    said, variables = resolved(place, HOME=place / "open", CUDA_CACHE_PATH=place / "closed" / "cuda")
    assert len(said) == 1 and said[0].startswith("caches: CUDA_CACHE_PATH cannot")
    assert variables["CUDA_CACHE_PATH"].startswith(f"{place}/tmp/") and variables["HOME"] == f"{place}/open"


def test_a_temporary_folder_that_someone_else_made_is_not_used(place: Path) -> None:
    uid = 12345 if os.getuid() == 0 else os.getuid()
    (place / "tmp" / f"finetune-cache-{uid}").symlink_to(place / "open")
    _, variables = resolved(place)
    assert Path(variables["HOME"]).parent == place / "tmp" and not Path(variables["HOME"]).is_symlink()


def test_a_hub_cache_that_can_only_be_read_is_read(place: Path) -> None:
    (place / "closed" / "hub").mkdir()
    (place / "closed").chmod(0o555)
    said, variables = resolved(place, HOME=place / "open", HF_HOME=place / "closed")
    assert variables["HF_HUB_CACHE"] == f"{place}/closed/hub" and variables["HF_HOME"].startswith(f"{place}/tmp")
    assert len(said) == 2 and f"{place}/closed/hub" in said[1]
    said, variables = resolved(place, HOME=place / "open", HF_HOME=place / "closed", HF_HUB_CACHE=place / "open")
    assert variables["HF_HUB_CACHE"] == f"{place}/open" and len(said) == 1


@pytest.mark.parametrize(
    ("given", "seen"), [({}, "0"), ({"CUDA_VISIBLE_DEVICES": ""}, ""), ({"CUDA_VISIBLE_DEVICES": "1,0"}, "1")]
)
def test_one_gpu_is_seen_and_none_where_all_are_hidden(given: dict[str, str], seen: str) -> None:
    found = layered({}, {"HOME": "/tmp", "HF_HOME": "", **given})
    assert "HF_HOME" not in found
    assert variables(Settings.from_env(found), found)["CUDA_VISIBLE_DEVICES"] == seen
