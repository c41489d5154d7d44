"""Whether this is a container, of which kind, and what would be lost with it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

Kind = Literal["docker", "podman", "kubernetes", "apptainer"]
ROOT = Path("/")
PROGRAM = Path(__file__).resolve().parent.parent.parent
CACHE = '-v "$PWD/cache:/cache"'
VOLUMES = f'-v "$PWD/outputs:/outputs" {CACHE}'
KEEP_ID = "--userns=keep-id:uid=1000,gid=1000"  # the image's user is then who started podman (4.3 and newer)
IDENTITY = ["0", "0", "4294967295"]


def kind(environ: Mapping[str, str], root: Path = ROOT) -> Kind | None:
    """What runs this container, as the marks say that each leaves; None: no container is known here."""
    if environ.get("APPTAINER_CONTAINER") or environ.get("SINGULARITY_CONTAINER"):
        return "apptainer"
    if environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    if (root / "run/.containerenv").exists():
        return "podman"
    if (root / ".dockerenv").exists():
        return "docker"
    return None


def rootless(root: Path = ROOT) -> bool:
    """Whether users in here are others outside: user 0 is whoever started the container, and 1000 owns nothing there."""
    try:
        return (root / "proc/self/uid_map").read_text(encoding="utf-8").split() != IDENTITY
    except OSError:
        return False


def image(program: Path = PROGRAM) -> bool:
    """Whether this program runs in its image, or in one made from it."""
    return (program / "build.json").is_file()


def command(environ: Mapping[str, str], options: str = VOLUMES, root: Path = ROOT) -> str:
    """How a container with a GPU is started here, with volumes that keep results and model."""
    if kind(environ, root) == "podman":
        flags = f"{KEEP_ID} --security-opt=label=disable --device nvidia.com/gpu=all"
        return f"podman run {flags} {options} IMAGE"
    return f"docker run --gpus all {options} IMAGE"


def mounted(folder: Path, suffix: str = "") -> str:
    """The option that mounts a folder of the host there, one of the same name and `suffix`."""
    place = Path(os.path.abspath(folder))
    return f'-v "$PWD/{place.name or "outputs"}{suffix}:{place}"'


def another(folder: Path, root: Path = ROOT) -> str:
    """What to give so that a run goes to another folder than this one, and stays."""
    if image() and lost(Path(os.path.abspath(folder)).parent, root):
        return mounted(folder, "-2")
    return f"OUTPUT_DIR={folder}-2"


def owner(environ: Mapping[str, str], folder: Path, root: Path = ROOT) -> str:
    """What gives a container the right to write `folder`."""
    here = kind(environ, root)
    if here == "kubernetes":
        return "in Kubernetes set securityContext.fsGroup and runAsUser of the pod to the owner of the volume"
    if here == "apptainer":
        return f"with Apptainer mount a folder of yours: {mounted(folder).replace('-v', '--bind')}"
    if not rootless(root):
        return f"with Docker add --user $(id -u):$(id -g), and mount a folder that you made: {mounted(folder)}"
    if here == "podman":
        return (
            f"with rootless podman add {KEEP_ID} (or mount with -v …:/outputs:U), and --security-opt=label=disable where SELinux "
            "is on"
        )
    return "users are renumbered in here (rootless Docker): add --user 0:0, which is you outside of the container"


def lost(folder: Path, root: Path = ROOT) -> str | None:
    """Why what is written to `folder` is gone with the container, in words; None: it stays."""
    found = None
    real = os.path.realpath(folder)
    for source, point, system in _mounts(root):
        if real == point or real.startswith(point.rstrip("/") + "/"):
            found = source, point, system  # a later mount hides an earlier one
    if found is None:
        return None
    source, point, system = found
    if point == "/" and system not in ("squashfs", "ext3"):
        return "it lies in the container itself"
    if system in ("tmpfs", "ramfs") and "kubernetes.io~empty-dir" not in source:
        return "it lies in memory (tmpfs)"
    if re.search(r"/volumes/[0-9a-f]{64}/_data$", source):
        return "it lies in a volume without a name"
    if "/kubernetes.io~empty-dir/" in source:
        return "it lies in an emptyDir of the pod"
    return None


def _mounts(root: Path) -> Iterator[tuple[str, str, str]]:
    """Of each mount that this process sees: which folder of its file system, where, and the file system's type. proc(5)"""
    try:
        lines = (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        before, _, after = line.partition(" - ")
        fields = [re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), word) for word in before.split(" ")]
        if len(fields) >= 5 and after:
            yield fields[3], fields[4], after.split(" ")[0]
