"""The built image, in a real engine.

FINETUNE_IMAGE=tag tests an image that exists. Else the image is built with scripts/image.sh: by the engine that answers
(DOCKER_HOST or the machine's own), on BASE or the default base; where none answers, by one that scripts/docker_engine.sh
starts for these tests alone, on the stand-in base.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
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


def _engine() -> tuple[str, bool]:
    """(client, whether an engine answers it)."""
    for client in filter(None, (os.environ.get("DOCKER"), shutil.which("docker"), "/usr/bin/docker")):
        if Path(client).exists() and subprocess.run([client, "info"], capture_output=True).returncode == 0:
            return client, True
    return "", False


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    environ, started = dict(os.environ), None
    client, answers = _engine()
    try:
        if not answers:
            if os.geteuid() != 0 or not Path("/etc/apt/sources.list.d/debian.sources").exists():
                pytest.skip(
                    "no Docker engine answers, and only root on Debian can start one: install Docker or set DOCKER_HOST"
                )
            started = tempfile.mkdtemp(prefix="finetune-engine-")
            script = [str(ROOT / "scripts/docker_engine.sh"), "start", started]
            lines = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True).stdout
            environ |= dict(word.split("=", 1) for word in lines.removeprefix("export ").split())
            client = environ["DOCKER"]
        environ["DOCKER"] = client
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
        yield Image(tag, client, environ)
    finally:
        if started:
            subprocess.run([str(ROOT / "scripts/docker_engine.sh"), "stop", started], check=True)


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """A folder that any user may write, as a host folder to mount."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder
