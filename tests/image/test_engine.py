"""What the tests of the image stand on: scripts/docker_engine.sh, apt_install.sh, image_arguments.sh."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT

HOLD = """
import fcntl, sys, time
files = [open(name, "w") for name in sys.argv[1:]]
for file in files: fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
for file in files: time.sleep(3); fcntl.lockf(file, fcntl.LOCK_UN)
"""


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/var/lib/apt/lists").is_dir(), reason="only root on Debian uses apt")
def test_apt_is_waited_for() -> None:
    locks = ("/var/lib/apt/lists/lock", "/var/lib/dpkg/lock-frontend")
    with subprocess.Popen([sys.executable, "-c", HOLD, *locks], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"\n"
        began = time.monotonic()
        done = subprocess.run([ROOT / "scripts/apt_install.sh", "mount"], capture_output=True, text=True)
        took = time.monotonic() - began
    assert (done.returncode, done.stderr) == (0, "") and took > 5


def arguments(**environ: str) -> list[str]:
    """What image.sh gives `docker build`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("BASE", "PIP_INDEX_URL", "PIP_CONFIG_FILE", "CUDA")}
    script = '. scripts/image_arguments.sh; printf "%s\\n" "${arguments[@]}" "${secrets[@]}"'
    done = subprocess.run(
        ["bash", "-euc", script], cwd=ROOT, env={**kept, **environ}, check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


def test_a_mirror_and_another_base_reach_the_build(tmp_path: Path) -> None:
    said = arguments(
        PIP_INDEX_URL="https://user:password-of-a-test@mirror.invalid/simple", BASE="mirror.invalid/cuda:13"
    )
    # by its name alone: the address may hold a password, and neither the image's history nor a process list shall show it
    assert "id=index,env=PIP_INDEX_URL" in said and "password-of-a-test" not in " ".join(said)
    assert "BASE=mirror.invalid/cuda:13" in said
    (tmp_path / "pip.conf").write_text("[global]\n")
    assert f"id=pipconf,src={tmp_path / 'pip.conf'}" in arguments(PIP_CONFIG_FILE=str(tmp_path / "pip.conf"))
    plain = " ".join(arguments())
    assert "id=index" not in plain and "BASE=nvidia/cuda:" in plain
