"""Every block of docs/platforms.md, tried as far as it goes without a GPU and without the platform."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import fetched
import launchers
from conftest import ROOT, Image
from test_run import TINY

pytestmark = pytest.mark.timeout(1800)  # the first test builds the image
PAGE = (ROOT / "docs/platforms.md").read_text()
SECTIONS = dict(part.split("\n", 1) for part in PAGE.split("\n## ")[1:])
TAG = "REGISTRY/finetune-ssh:TAG"  # what the page calls an image of one's own


def block(heading: str, language: str) -> str:
    """The one block of a section in a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[heading], re.M | re.S)
    assert len(found) == 1, heading
    return str(found[0])


@pytest.fixture(scope="module")
def clients() -> Path:
    """A folder for PYTHONPATH with the platforms' own clients, fetched once and by hash."""
    return fetched.packages("platforms.txt")


def python(clients: Path, code: str, *words: str, cwd: Path) -> str:
    """Run `code` with the clients; what it prints. -S and PYTHONPATH: of this environment nothing but the standard library."""
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(cwd),
        "PYTHONPATH": str(clients),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    }
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *words], env=environ, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Desk:
    """Where the blocks are typed: an empty folder, with launchers.py for every launcher."""

    def __init__(self, image: Image, folder: Path, models: Path):
        self.image, self.folder, self.models = image, folder, models
        programs = folder / "programs"
        programs.mkdir()
        for name in ("docker", "podman", "srun", "apptainer"):
            program = programs / name
            program.write_text(f"#!{sys.executable}\n" + (ROOT / "tests/image/launchers.py").read_text())
            program.chmod(0o755)
        (folder / "home").mkdir()
        for name in ("outputs", "cache"):
            (folder / name).mkdir()
            (folder / name).chmod(0o1777)

    def type(self, text: str, verb: str = "", **changes: str) -> str:
        """What bash says to `text`; with a verb instead of `train`, nothing is trained."""
        values = [word for name, value in {**TINY, **changes}.items() for word in ("-e", f"{name}={value}")]
        environ = {
            **self.image.environ, "PATH": f"{self.folder / 'programs'}:{os.environ['PATH']}", "HOME": str(self.folder / "home"),
            "ENGINE": shutil.which(self.image.docker) or self.image.docker, "TAG": self.image.tag, "VERB": verb,
            "OPTIONS": json.dumps(["-v", f"{self.models}:/models:ro", *values]),
        }  # fmt: skip
        text = text.replace("IMAGE", self.image.tag).replace("MAX_STEPS=60", "MAX_STEPS=1")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env=environ,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def desk(image: Image, tmp_path: Path, models: Path) -> Desk:
    return Desk(image, tmp_path, models)


def test_the_page_has_a_block_for_every_platform_and_names_no_registry() -> None:
    text = PAGE.lower()
    for platform in (
        "compose",
        "podman",
        "runpod",
        "skyPilot",
        "modal",
        "hugging face jobs",
        "kubernetes",
        "pyxis",
        "apptainer",
    ):
        assert platform.lower() in text
    assert all("\n```" in section and "Tried: " in section for section in SECTIONS.values())
    images = re.findall(r"(?:image_id: docker:|imageName: |^ *image: |docker://|FROM )(\S+)", PAGE, re.M)
    assert images and set(images) <= {"IMAGE", TAG}


@pytest.mark.parametrize("heading", ["Docker", "Podman without root", "Slurm with Pyxis"])
def test_the_commands_reach_the_program(desk: Desk, heading: str) -> None:
    said = desk.type(block(heading, "sh"), verb="check")
    assert said.count("all good") == block(heading, "sh").count("IMAGE"), said


def test_the_models_of_the_host_are_used(desk: Desk) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    kept = desk.folder / "home/.cache/huggingface/hub/models--you--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text(commit)
    shutil.copytree(desk.models / "llama", kept / "snapshots" / commit)
    for folder in (desk.folder / "home").rglob("*"):
        folder.chmod(0o777)
    text = block("Docker with the models that this machine has already", "sh")
    desk.type(text, MODEL_NAME="you/tiny", HF_HUB_OFFLINE="1", SAVE_MERGED="0")
    assert (desk.folder / "outputs/adapter").is_dir()
    assert commit in json.dumps(json.loads((desk.folder / "outputs/run.json").read_text())["model"])


def test_apptainer_trains_as_a_stranger_on_a_closed_root(desk: Desk) -> None:
    said = desk.type(block("Apptainer", "sh"))
    assert '"docker://' in said and "step 1/1" in said
    assert (desk.folder / "outputs/merged").is_dir()


def test_compose(clients: Path, tmp_path: Path) -> None:
    text = block("Docker Compose", "sh")
    assert "docker compose -f docker/compose.yaml run --rm train" in text and "FINETUNE_USER=" in text
    code = "import sys; from check_jsonschema import main; sys.exit(main())"
    said = python(
        clients, code, "--builtin-schema", "vendor.compose-spec", str(ROOT / "docker/compose.yaml"), cwd=tmp_path
    )
    assert "ok" in said
    assert "train" in yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]


def test_kubernetes(clients: Path, image: Image, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(block("Kubernetes", "yaml"))
    code = (
        "import kubernetes_validate as k, yaml; job = yaml.safe_load(open('job.yaml')); k.validate(job, k.latest_version(), strict=True); "
        "job['spec']['template']['spec']['no'] = 1\n"
        "try: k.validate(job, k.latest_version(), strict=True)\nexcept k.ValidationError: print('strict')"
    )
    assert python(clients, code, cwd=tmp_path) == "strict\n"
    pod = yaml.safe_load((tmp_path / "job.yaml").read_text())["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]}
    assert set(image.inspect()["Config"]["Volumes"]) <= {m["mountPath"] for m in container["volumeMounts"]}
    assert "command" not in container


def test_slurm_script() -> None:
    script = block("Slurm with Pyxis", "sh")
    for command in (["bash", "-n"], [str(Path(sys.prefix) / "bin/shellcheck"), "-"]):
        done = subprocess.run(command, input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_jobs_of_hugging_face(tmp_path: Path) -> None:
    text = block("Hugging Face Jobs", "sh").replace("hf jobs run", "hf jobs run --dry-run").replace("IMAGE", TAG)
    environ = {
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "HF_TOKEN": "token_of_a_test",
    }
    environ |= {"HF_HUB_DISABLE_UPDATE_CHECK": "1", "NO_COLOR": "1"}
    done = subprocess.run(["bash", "-euc", text], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "token_of_a_test" not in done.stdout and "HF_TOKEN=***" in done.stdout
    said = dict(line.strip().split(None, 1) for line in done.stdout.splitlines()[1:] if line.startswith("  "))
    assert said["image"] == TAG and said["command"].startswith("/opt/venv/bin/python /app/entrypoint.py train ")


def test_skypilot_and_modal(clients: Path, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(block("SkyPilot", "yaml"))
    (tmp_path / "app.py").write_text(block("Modal", "python").replace("IMAGE", TAG))
    code = (
        "import json, sky, app; task = sky.Task.from_yaml('task.yaml'); (resources,) = task.resources\n"
        "print(json.dumps([resources.extract_docker_image(), resources.accelerators, task.run, task.envs, "
        "app.train._spec_.gpus, sorted(app.train._spec_.volumes)]))"
    )
    image, accelerators, run, environ, gpus, volumes = json.loads(python(clients, code, cwd=tmp_path).splitlines()[-1])
    assert image == TAG and accelerators == {"A100": 1}
    assert "/opt/venv/bin/python /app/entrypoint.py train" in run and environ == {"MAX_STEPS": "60"}
    assert gpus == "A100" and volumes == ["/cache", "/outputs"]


@pytest.fixture(scope="module")
def own(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The image of one's own, built as the page has it. The package index may need this machine's CA file: it is laid below."""
    folder = tmp_path_factory.mktemp("own")
    own, below = Image("finetune-own:test", image.docker, image.environ), image.tag
    if authority := next(
        (p for n in ("SSL_CERT_FILE", "PIP_CERT") if Path(p := os.environ.get(n, "")).is_file()), None
    ):
        below = "finetune-own:below"
        shutil.copy(authority, folder / "ca.pem")
        (folder / "Dockerfile").write_text(f"FROM {image.tag}\nCOPY ca.pem /ca.pem\nENV PIP_CERT=/ca.pem\n")
        assert own.call("build", "-q", "-t", below, str(folder)).returncode == 0
    (folder / "Dockerfile").write_text(block("An image of your own on top", "dockerfile").replace("IMAGE", below))
    assert len((folder / "Dockerfile").read_text().splitlines()) == 5
    done = own.call("build", "-t", own.tag, str(folder), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    yield own
    own.call("rmi", "-f", own.tag, "finetune-own:below")


def test_an_image_on_top_is_entered_by_ssh_and_checks(own: Image, models: Path, tmp_path: Path) -> None:
    for name in ("ssh-keygen", "ssh"):
        assert own.run(name, "-V" if name == "ssh" else "-?").returncode in (0, 1)
    (tmp_path / "workspace").mkdir(mode=0o755)
    keys = own.run("sh", "-c", "ssh-keygen -q -t ed25519 -N '' -f /tmp/key && cat /tmp/key.pub /tmp/key").stdout
    public, private = keys.split("\n", 1)
    (tmp_path / "key").write_text(private)
    (tmp_path / "key").chmod(0o600)
    mounts = (
        "-v",
        f"{tmp_path / 'workspace'}:/workspace",
        "-v",
        f"{models}:/models:ro",
        "-v",
        f"{tmp_path / 'key'}:/key:ro",
    )
    start = ("run", "-d", "--pull", "never", "--network", "none", *mounts, "-e", f"PUBLIC_KEY={public}", own.tag)
    container = own.call(*start).stdout.strip()
    try:
        small = "MODEL_NAME=/models/llama DATASET_NAME=samples DATASET_CONFIG=en"
        typed = block("RunPod", "sh").replace("train OUTPUT_DIR", "check OUTPUT_DIR").replace("MAX_STEPS=60", small)
        typed = typed.replace("check OUTPUT_DIR=/workspace/outputs\n", f"check OUTPUT_DIR=/workspace/outputs {small}\n")
        ssh = ("ssh", "-i", "/key", "-o", "StrictHostKeyChecking=no", "-o", "ConnectionAttempts=20", "root@127.0.0.1")
        for command, wanted in (
            (typed, "all good"),
            ("git --version; rsync --version; tmux -V; nvitop --version; pip freeze | grep ^torch=", "torch=="),
        ):
            done = own.call("exec", container, *ssh, f"bash -lc '{command}'")
            assert done.returncode == 0 and wanted in done.stdout, done.stdout + done.stderr
    finally:
        own.call("rm", "-f", "-v", container)


def test_a_build_on_top_goes_by_dockers_own_shell(image: Image, tmp_path: Path) -> None:
    # an unset variable and a failure before `;` end no step of others; a package brings its manual pages
    (tmp_path / "Dockerfile").write_text(f'FROM {image.tag}\nUSER 0\nRUN false; echo "$UNSET" >/made\n')
    done = image.call("build", "-q", str(tmp_path))
    assert done.returncode == 0, done.stderr
    kept = image.run("sh", "-c", "cat /etc/dpkg/dpkg.cfg.d/* 2>/dev/null").stdout
    base = image.inspect()["Config"]["Labels"]["org.opencontainers.image.base.name"]
    before = image.call(
        "run", "--rm", "--pull", "never", base, "sh", "-c", "cat /etc/dpkg/dpkg.cfg.d/* 2>/dev/null"
    ).stdout
    assert kept == before
    image.call("rmi", "-f", done.stdout.strip())


def test_launchers_know_every_option_of_the_page() -> None:
    assert launchers.taken_out(["--gpus", "all", "-v", "/a:/b:Z", "--userns", "x", "i"]) == ["-v", "/a:/b", "i"]
