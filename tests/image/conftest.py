"""The built image, in a real engine.

`make test-image` runs these tests under scripts/docker_engine.sh, which names client and base (DOCKER, BASE) where it starts an
engine of its own. FINETUNE_IMAGE=tag tests an image that exists; else the image is built with scripts/image.sh.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Image:
    """One image, and the ways to run it."""

    def __init__(self, tag: str, docker: str, environ: dict[str, str]):
        self.tag, self.docker, self.environ = tag, docker, environ

    def call(self, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """The Docker client with `words`."""
        return subprocess.run([self.docker, *words], env=self.environ, capture_output=True, text=True, timeout=timeout)

    def run(
        self, *command: str, options: tuple[str, ...] = (), timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """`docker run` without a network, removed afterwards."""
        return self.call(
            "run", "--rm", "--pull", "never", "--network", "none", *options, self.tag, *command, timeout=timeout
        )

    def python(self, script: Path, *options: str, timeout: float = 300) -> Any:
        """Run a script of tests/image/inside with the image's Python; the JSON in its last line of output."""
        mount = f"{script}:/inside.py:ro"
        done = self.run("python", "/inside.py", options=("-v", mount, "--user", "0", *options), timeout=timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def inspect(self) -> Any:
        """What `docker inspect` says of the image."""
        return json.loads(self.call("image", "inspect", self.tag).stdout)[0]


@pytest.fixture(scope="session")
def image() -> Image:
    environ = dict(os.environ)
    docker = environ.get("DOCKER") or "docker"
    tag = environ.get("FINETUNE_IMAGE") or "finetune:under-test"
    if "FINETUNE_IMAGE" not in environ:
        build = subprocess.run(
            [str(ROOT / "scripts/image.sh")],
            env={**environ, "IMAGE": tag},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert build.returncode == 0, build.stdout[-4000:]
    return Image(tag, docker, environ)


@pytest.fixture(scope="session")
def models(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama, made by the image itself."""
    folder = tmp_path_factory.mktemp("models")
    folder.chmod(0o1777)
    make = (
        "import os, sys; sys.path.insert(0, '/app/tests'); import tiny; from pathlib import Path; folder = Path('/models/llama'); "
        "tiny.model(folder); [os.chmod(file, 0o644) for file in folder.iterdir()]"  # weights are written for their owner alone
    )
    done = image.run(
        "python",
        "-c",
        make,
        options=("-v", f"{folder}:/models", "-v", f"{ROOT / 'tests/tiny.py'}:/app/tests/tiny.py:ro"),
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """A folder that any user may write, as a host folder to mount."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder
