"""The program in the image: real runs, exit code and log asserted. No network in any of them, and no GPU."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import smoke
from conftest import ROOT, Image
from fake_machine import H100, driver, smi

pytestmark = pytest.mark.timeout(1800)  # the first test builds the image
HARD = (
    "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp:mode=1777,exec,size=2g",
)  # fmt: skip
STRANGER = ("--user", "12345:23456")
TINY = {
    "MODEL_NAME": "/models/llama", "DATASET_NAME": "samples", "DATASET_CONFIG": "en", "DATASET_SPLIT": "train[0:8]",
    "MAX_SEQ_LENGTH": "128", "PER_DEVICE_TRAIN_BATCH_SIZE": "1", "GRADIENT_ACCUMULATION_STEPS": "2", "MAX_STEPS": "3",
    "LOGGING_STEPS": "1", "MAX_NEW_TOKENS": "4", "DATASET_NUM_PROC": "1", "SAMPLE_QUESTION": "Why?",
}  # fmt: skip
SHORT = {"MAX_SEQ_LENGTH": "32", "GRADIENT_ACCUMULATION_STEPS": "1"}  # for many steps


def options(models: Path, outputs: Path, **changes: str) -> tuple[str, ...]:
    """`docker run` options for a tiny run into `outputs`."""
    values = [word for name, value in {**TINY, **changes}.items() for word in ("-e", f"{name}={value}")]
    return ("-v", f"{models}:/models:ro", "-v", f"{outputs}:/outputs", *values)


def clean(done: subprocess.CompletedProcess[str]) -> str:
    """The log of a good run: exit code 0, and not one warning or error."""
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    assert not re.search(r"warn|error|traceback|deprecat|failed", log, re.I), log
    return log


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M, made on the host as `make smoke` does."""
    made = subprocess.run([sys.executable, ROOT / "scripts/smoke_model.py"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return Path(made.stdout.strip())


def test_the_smoke_run_as_a_stranger_in_a_closed_container(image: Image, smollm2: Path, open_folder: Path) -> None:
    # waiting threads sleep, as under make smoke: the machine may be busy
    settings = {**smoke.SETTINGS, "MODEL_NAME": "/model", "OMP_WAIT_POLICY": "passive"}
    values = [word for name, value in settings.items() for word in ("-e", f"{name}={value}")]
    mounts = ("-v", f"{smollm2}:/model:ro", "-v", f"{open_folder}:/outputs")
    create = ("create", "--pull", "never", "--network", "none", *HARD, *STRANGER, *mounts, *values, image.tag)
    container = image.call(*create).stdout.strip()
    try:
        log = clean(image.call("start", "-a", container, timeout=900))
        changed = {line.split(" ", 1)[1] for line in image.call("diff", container).stdout.splitlines()}
    finally:
        image.call("rm", "-f", "-v", container)
    assert f"step {smoke.SETTINGS['MAX_STEPS']}/{smoke.SETTINGS['MAX_STEPS']}" in log
    assert changed <= {"/model"}  # where the engine mounts it
    record = json.loads((open_folder / "run.json").read_text())
    build = json.loads(image.run("cat", "/app/build.json").stdout)
    assert build["revision"] in json.dumps(record) and build["lock_sha256"] in json.dumps(record)
    losses = record["training"]["losses"]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.5
    written = list(open_folder.rglob("*"))
    assert {(p.stat().st_uid, p.stat().st_gid) for p in written} == {(12345, 23456)}
    assert not any(p.stat().st_mode & (stat.S_ISUID | stat.S_ISGID) for p in written if p.is_file())
    assert {"adapter", "merged", "run.json", "metrics.jsonl", "report.html", "README.md"} <= {
        p.name for p in open_folder.iterdir()
    }
    verify = clean(image.run("verify", options=(*HARD, *STRANGER, "-v", f"{open_folder}:/outputs:ro")))
    assert f"all {len(record['files'])} files are as the run wrote them" in verify
    beside = image.run("reproduce", "outputs/run.json", options=(*HARD, *STRANGER, *mounts))
    assert beside.returncode == 3 and '-v "$PWD/outputs-reproduced:/outputs-reproduced"' in beside.stderr, beside.stderr


def test_writes_only_to_the_volumes_and_tmp(image: Image, models: Path, open_folder: Path) -> None:
    container = image.call(
        "create", "--pull", "never", "--network", "none", *options(models, open_folder), image.tag
    ).stdout.strip()
    try:
        done = image.call("start", "-a", container, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        changed = [line.split(" ", 1)[1] for line in image.call("diff", container).stdout.splitlines()]
        # a folder on the way to a mount is made by the engine
        made_by_the_engine = {"/models", "/run", "/outputs", "/cache"}
        assert not [path for path in changed if path not in made_by_the_engine and not path.startswith("/tmp")], changed
    finally:
        image.call("rm", "-f", "-v", container)


@pytest.mark.parametrize("home", ["/cache", "/root", ""])
def test_caches_that_cannot_be_written_fall_back_and_one_line_says_so(
    image: Image, models: Path, open_folder: Path, tmp_path: Path, home: str
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    changes = {"HOME": home, "MAX_STEPS": "1", "SAVE_MERGED": "0"}  # /root may not even be entered
    mounts = ("-v", f"{closed}:/cache", *options(models, open_folder, **changes))
    log = clean(image.run(options=(*HARD, *STRANGER, *mounts), timeout=280))
    assert len(re.findall(r"^caches: HOME, XDG_CACHE_HOME, .*/tmp/", log, re.M)) == 1, log


def test_another_user_may_read_what_a_run_left_or_is_told_why_not(
    image: Image, models: Path, open_folder: Path
) -> None:
    clean(image.run(options=options(models, open_folder, MAX_STEPS="1", SAVE_MERGED="0"), timeout=280))
    closed = (*HARD, *STRANGER, "-v", f"{open_folder}:/outputs:ro")
    assert "files are as the run wrote them" in clean(image.run("verify", options=closed))
    (open_folder / "adapter/adapter_model.safetensors").chmod(0o600)
    for words in (("verify",), ("ask", "Why?")):
        done = image.run(*words, options=closed)
        assert done.returncode == 3 and "Traceback" not in done.stderr
        assert "cannot be read by user 12345" in done.stderr and "--user 1000:1000" in done.stderr


def test_env_is_the_reference(image: Image) -> None:
    done = image.run("env")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == (ROOT / "env.example").read_text()


def test_check(image: Image, models: Path, open_folder: Path) -> None:
    assert "all good" in clean(image.run("check", options=options(models, open_folder)))
    assert not list(open_folder.iterdir())


@pytest.mark.parametrize(("command", "code", "text"), [
    (("bash", "-c", "echo $0 $HOME"), 0, "bash /cache"),
    (("python", "-c", "print(6 * 7)"), 0, "42"),
    (("bash", "-lc", "command -v python"), 0, "/opt/venv/bin/python"),
    (("trian",), 127, "did you mean train?"),
    (("--help",), 0, "usage:"),
    (("no-such-verb",), 127, "neither a verb"),
    (("train", "MAX_STEP=3"), 2, "did you mean MAX_STEPS"),
    (("train", "LEARNING_RATE=abc"), 2, "LEARNING_RATE=abc"),
])  # fmt: skip
def test_verbs_and_commands(image: Image, command: tuple[str, ...], code: int, text: str) -> None:
    done = image.run(*command)
    assert done.returncode == code, done.stderr
    assert text in done.stdout + done.stderr


def test_train_without_a_gpu_says_so_at_once(image: Image) -> None:
    began = time.monotonic()
    done = image.run()
    took = time.monotonic() - began
    assert done.returncode == 3
    assert "No GPU is visible" in done.stderr and "docker run --gpus all" in done.stderr
    assert took < 2


@pytest.mark.parametrize(("line", "texts"), [
    ("0, GPU-1, Tesla T4, 15360, 15000, 450.80.02, 7.5", ("450.80.02", "CUDA 1", "newer")),
    ("0, GPU-1, Tesla V100-SXM2-16GB, 16384, 16000, 580.95.05, 7.0", ("V100", "7.0", "7.5")),
])  # fmt: skip
def test_refuses_an_old_driver_and_an_old_gpu(image: Image, tmp_path: Path, line: str, texts: tuple[str, ...]) -> None:
    # stands in for the nvidia-smi that the NVIDIA runtime mounts
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{line}'\n")
    tool.chmod(0o755)
    done = image.run(options=("-v", f"{tool}:/usr/bin/nvidia-smi:ro"))
    assert done.returncode == 3, done.stderr
    assert all(text in done.stderr for text in texts), done.stderr


def test_a_gpu_on_which_nothing_can_be_computed_is_refused(image: Image, tmp_path: Path) -> None:
    smi(tmp_path, H100)
    driver_of = driver(tmp_path, 304)
    mounts = (
        "-v",
        f"{tmp_path}/nvidia-smi:/usr/bin/nvidia-smi:ro",
        "-v",
        f"{driver_of}:/usr/lib/x86_64-linux-gnu/libcuda.so.1:ro",
    )
    done = image.run(options=mounts)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    for text in ("CUDA does not start (CUDA_ERROR_OF_A_TEST", "/dev/nvidia-uvm is missing", "nvidia-container-toolkit"):
        assert text in done.stderr, done.stderr
    utility = image.run(options=(*mounts[:2], "-e", "NVIDIA_DRIVER_CAPABILITIES=utility"))
    assert utility.returncode == 3 and "NVIDIA_DRIVER_CAPABILITIES=utility lacks compute" in utility.stderr


@pytest.mark.parametrize(("limit", "code", "texts"), [
    (("--memory", "700m"), 3, ("may use 0.7 GiB", "137", "--memory 2g")),
    (("--pids-limit", "10"), 3, ("more processes and threads may be started", "--pids-limit")),
    (("-e", "WORLD_SIZE=2", "-e", "RANK=0", "-e", "MASTER_ADDR=nowhere"), 2, ("WORLD_SIZE=2: a launcher",)),
])  # fmt: skip
def test_what_the_container_may_not_do_is_said_before_it_costs(
    image: Image, models: Path, open_folder: Path, limit: tuple[str, ...], code: int, texts: tuple[str, ...]
) -> None:
    done = image.run("train", options=(*options(models, open_folder), *limit))
    assert done.returncode == code and all(text in done.stderr for text in texts), done.stderr
    assert "Traceback" not in done.stderr and not list(open_folder.iterdir())


def test_results_in_a_volume_without_a_name_are_told(image: Image, models: Path) -> None:
    mount = ("-v", f"{models}:/models:ro", "-e", "MODEL_NAME=/models/llama", "--tmpfs", "/cache:noexec,mode=1777")
    log = clean(image.run("check", options=mount))
    assert "goes away with this container, since it lies in a volume without a name" in log
    assert '-v "$PWD/outputs:/outputs" -v "$PWD/cache:/cache"' in log
    assert "TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR hold no programs (mounted noexec) and go to /tmp/" in log


def test_the_self_test_as_a_stranger_in_a_closed_container(image: Image) -> None:
    log = clean(image.run("selftest", "ENGINE=transformers", options=(*HARD, *STRANGER), timeout=280))
    assert "selftest: all 7 tests are good" in log
    done = image.run("selftest")
    assert done.returncode == 3 and "not tested  Triton" in done.stdout and "docker run --gpus all" in done.stdout


def test_the_image_for_cuda_13_names_the_other_one(image: Image, tmp_path: Path) -> None:
    if json.loads(image.run("cat", "/app/build.json").stdout)["lock"] != "requirements.txt":
        pytest.skip("this is the image for CUDA 12.8")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, GPU-1, NVIDIA A100-SXM4-40GB, 40960, 40000, 570.86.15, 8.0'\n")
    tool.chmod(0o755)
    done = image.run(options=("-v", f"{tool}:/usr/bin/nvidia-smi:ro"))
    assert done.returncode == 3
    assert all(text in done.stderr for text in ("570.86.15", "CUDA 13.0", "580", "CUDA=12.8")), done.stderr


def test_env_file_with_quotes_and_comments(image: Image, models: Path, open_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.env"
    file.write_text("# a comment\nMAX_STEPS=2\nRUN_NAME=\"in quotes\"\nLEARNING_RATE='1e-3'\nNUM_TRAIN_EPOCHS=\n")
    # docker hands quotes on as they stand; -e on the line would win over the file, so MAX_STEPS is not given here
    rest = options(models, open_folder, SAVE_MERGED="0")
    at = rest.index("MAX_STEPS=3")
    clean(image.run(options=("--cpus", "1", "--env-file", str(file), *rest[: at - 1], *rest[at + 1 :]), timeout=280))
    record = json.loads((open_folder / "run.json").read_text())
    settings = record["settings"]
    assert record["environment"]["cpu_threads"] == 1
    assert (settings["MAX_STEPS"], settings["RUN_NAME"], settings["LEARNING_RATE"]) == (2, "in quotes", 1e-3)


def test_what_compose_asks_for_is_enough(image: Image, models: Path, open_folder: Path, tmp_path: Path) -> None:
    # by the words of `docker run`, since the engine alone is here: all but the GPU, and what it is built from
    service = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["train"]
    words = ["--user", service.pop("user").partition(":-")[2].rstrip("}"), "--shm-size", service.pop("shm_size")]
    assert service.pop("stop_grace_period") == "2m"
    words += ["--stop-timeout", "120"]
    words += ["--read-only"] * service.pop("read_only")
    for key, option in (("cap_drop", "--cap-drop"), ("security_opt", "--security-opt"), ("tmpfs", "--tmpfs")):
        words += [word for value in service.pop(key) for word in (option, value)]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o1777)
    folders = {"../outputs": open_folder, "../cache": tmp_path / "cache"}
    for volume in service.pop("volumes"):
        words += ["-v", f"{folders[volume['source']]}:{volume['target']}"]
    (tmp_path / "token").write_text("hf_token_of_a_test\n")
    assert service.pop("secrets") == ["hf_token"]
    (name,) = service.pop("environment")
    words += ["-v", f"{tmp_path / 'token'}:/run/secrets/hf_token:ro", "-e", f"{name}=/run/secrets/hf_token"]
    assert set(service) == {"image", "env_file", "deploy"}
    tiny = options(models, open_folder, HF_HUB_OFFLINE="1", MAX_STEPS="1")[4:]
    log = clean(image.run(options=(*words, "-v", f"{models}:/models:ro", *tiny), timeout=280))
    assert "step 1/1" in log and "hf_token_of_a_test" not in log
    both = image.run(
        "check", options=(*words, "-e", "HF_TOKEN=hf_another")
    )  # so the file was read: a second one is refused
    assert both.returncode == 2 and "HF_TOKEN and HF_TOKEN_FILE are both set" in both.stderr, both.stderr
    assert (open_folder / "merged").is_dir() and any((tmp_path / "cache").iterdir())


def test_an_empty_variable_is_an_unset_one(image: Image, models: Path, open_folder: Path) -> None:
    default = re.search(r"^# MAX_STEPS=(\d+)", (ROOT / "env.example").read_text(), re.M)
    assert default is not None
    clean(image.run(options=options(models, open_folder, **SHORT, MAX_STEPS="", SAVE_MERGED="0"), timeout=280))
    record = json.loads((open_folder / "run.json").read_text())
    assert record["settings"]["MAX_STEPS"] == int(default[1])
    assert len((open_folder / "metrics.jsonl").read_text().splitlines()) == int(default[1])


def test_an_output_folder_of_another_user_is_refused_with_the_remedy(
    image: Image, models: Path, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("a folder that belongs to another user takes root to make")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    done = image.run(options=options(models, closed))
    assert done.returncode == 3
    assert "cannot be written" in done.stderr and "--user $(id -u):$(id -g)" in done.stderr


def test_stop_saves_a_checkpoint_and_the_next_run_goes_on(image: Image, models: Path, open_folder: Path) -> None:
    tiny = options(models, open_folder, **SHORT, MAX_STEPS="60", SAVE_STEPS="0", SAVE_MERGED="0", HEALTH_TIMEOUT="77")
    container = image.call(
        "run", "-d", "--pull", "never", "--network", "none", *HARD, *STRANGER, *tiny, image.tag
    ).stdout.strip()
    try:
        deadline = time.monotonic() + 120
        while "step 3/60" not in (log := image.call("logs", container).stdout):
            assert time.monotonic() < deadline, log
            time.sleep(0.5)
        beat = json.loads(image.call("exec", container, "cat", "/tmp/finetune/heartbeat.json").stdout)
        assert (beat["phase"], beat["timeout"]) == ("training", 77)  # what the health check looks at
        began = time.monotonic()
        image.call("stop", container)  # with Docker's own 10 s
        took = time.monotonic() - began
        state = json.loads(image.call("inspect", "--format", "{{json .State}}", container).stdout)
        assert (state["ExitCode"], state["OOMKilled"]) == (143, False), image.call("logs", container).stderr
        assert took < 10
        assert (
            "SIGTERM: a checkpoint is saved after this update (updates take about"
            in image.call("logs", container).stderr
        )
    finally:
        image.call("rm", "-f", "-v", container)
    saved = [p.name for p in (open_folder / "checkpoints").glob("checkpoint-*")]
    assert len(saved) == 1, saved
    step = int(saved[0].rpartition("-")[2])
    log = clean(image.run(options=(*HARD, *STRANGER, *tiny), timeout=280))
    first = re.search(r"^step (\d+)/60", log, re.M)
    assert first is not None and int(first[1]) == step + 1, log[:2000]
    assert len((open_folder / "metrics.jsonl").read_text().splitlines()) == 60
