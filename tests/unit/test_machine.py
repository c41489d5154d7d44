"""What the machine allows, with a driver and a file system of our own: CUDA, containers, limits, caches."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest

from fake_machine import H100, driver, root, smi
from finetune import environment, files
from finetune.errors import MachineError, SettingsError
from finetune.machine import container, cuda, launcher, limits, memory, preflight
from finetune.machine.gpus import gpus
from finetune.settings import Settings
from finetune.verbs import lock_inputs

OVERLAY = "30 20 0:30 / / rw - overlay overlay rw,lowerdir=/a\n"
VOLUME = "31 30 8:1 /var/lib/docker/volumes/{name}/_data /outputs rw - ext4 /dev/sda1 rw\n"
BOUND = "31 30 8:1 /home/me/out\\040puts /outputs rw - ext4 /dev/sda1 rw\n"
IDENTITY = "         0          0 4294967295\n"
PODMAN = "         0       1000          1\n         1     100000      65536\n"


@pytest.fixture
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def told(folder: Path, library: Path, monkeypatch: pytest.MonkeyPatch, **environ: str) -> list[str]:
    """What is said of a listed H100 with this driver."""
    monkeypatch.setattr(cuda, "LIBRARY", str(library))
    return list(cuda.problems(gpus(smi(folder, H100)), environ, folder))


def test_a_driver_that_works_is_no_problem(tmp_path: Path, drivers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(tmp_path, driver(drivers), monkeypatch) == []
    assert cuda.ask().count == 1


@pytest.mark.parametrize(
    ("code", "made", "environ", "texts"),
    [
        (None, {"_dot_dockerenv": ""}, {"NVIDIA_DRIVER_CAPABILITIES": "utility"}, ["cannot open shared object", "lacks compute", "=compute,utility"]),
        (None, {"_dot_dockerenv": ""}, {}, ["nvidia-container-toolkit", "docker run --gpus all", "/cache"]),
        (None, {"run__.containerenv": ""}, {}, ["nvidia-ctk cdi generate", "--device nvidia.com/gpu=all", "--security-opt=label=disable"]),
        (None, {}, {}, ["libcuda1"]),
        (304, {"_dot_dockerenv": ""}, {}, ["/dev/nvidia-uvm is missing", "nvidia-modprobe", "CUDA_ERROR_OF_A_TEST: a test says so"]),
        (999, {}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ["/dev/nvidia-uvm", "device plugin", "nvidia.com/gpu: 1"]),
        (802, {"dev__nvidia-uvm": ""}, {}, ["fabricmanager"]),
        (803, {"dev__nvidia-uvm": ""}, {}, ["another version"]),
        (46, {"dev__nvidia-uvm": ""}, {}, ["Another program may hold"]),
    ],
)  # fmt: skip
def test_a_gpu_that_is_listed_and_cannot_compute_is_told_with_the_way_out(
    tmp_path: Path, drivers: Path, monkeypatch: pytest.MonkeyPatch, code: int | None,
    made: dict[str, str], environ: dict[str, str], texts: list[str],
) -> None:  # fmt: skip
    root(tmp_path, **made)
    library = tmp_path / "absent.so.1" if code is None else driver(drivers, code)
    (sentence,) = told(tmp_path, library, monkeypatch, **environ)
    assert sentence.startswith("NVIDIA H100 80GB HBM3 is listed by nvidia-smi, and CUDA ")
    assert all(text in sentence for text in texts), sentence


def test_a_driver_without_a_device_and_one_that_hangs(
    tmp_path: Path, drivers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root(tmp_path, **{"dev__nvidia-uvm": ""})
    assert "CUDA finds no GPU" in told(tmp_path, driver(drivers, 0, 0), monkeypatch)[0]
    monkeypatch.setattr(cuda, "PATIENCE", 0.2)
    assert "no answer within" in told(tmp_path, driver(drivers, -1), monkeypatch)[0]


def test_without_nvidia_smi_the_driver_itself_names_the_gpus(
    tmp_path: Path, drivers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA_DRIVER_CAPABILITIES=compute mounts no nvidia-smi, and nvidia-smi does not list a MIG slice by its name."""
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\n"
    monkeypatch.setattr(container, "ROOT", root(tmp_path, proc__driver__nvidia__version=text))
    monkeypatch.setattr(cuda, "LIBRARY", str(driver(drivers, 0, 2)))
    found = cuda.visible({"PATH": "/nonexistent"})
    assert len(found) == 2 and found[0].name == "NVIDIA H100 MIG 1g.10gb" and found[0].memory == 10240
    assert (found[0].driver, found[0].capability) == ("580.95.05", (9, 0))
    monkeypatch.setattr(cuda, "LIBRARY", str(driver(drivers, 100, 0)))
    assert cuda.visible({"PATH": "/nonexistent"}) == []


@pytest.mark.parametrize(
    ("mounts", "folder", "why"),
    [
        (OVERLAY, "/outputs", "in the container itself"),
        (OVERLAY + VOLUME.format(name="ab" * 32), "/outputs/run", "a volume without a name"),
        (OVERLAY + VOLUME.format(name="mine"), "/outputs", None),
        (OVERLAY + BOUND, "/outputs", None),
        (OVERLAY + BOUND, "/outputs-2", "in the container itself"),
        (OVERLAY + "31 30 0:40 / /outputs rw - tmpfs tmpfs rw\n", "/outputs", "in memory"),
        (OVERLAY + "31 30 8:1 /var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/o /outputs rw - ext4 /dev/sda rw\n", "/outputs", "an emptyDir"),
        (OVERLAY + VOLUME.format(name="ab" * 32) + BOUND, "/outputs", None),
        ("", "/outputs", None),
    ],
)  # fmt: skip
def test_what_goes_away_with_the_container(tmp_path: Path, mounts: str, folder: str, why: str | None) -> None:
    found = container.lost(Path(folder), root(tmp_path, proc__self__mountinfo=mounts))
    assert (why is None and found is None) or (found is not None and why is not None and why in found)


def test_results_that_would_be_lost_are_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.from_env({"OUTPUT_DIR": str(tmp_path / "out"), "MODEL_NAME": "org/some-1M"})
    assert not any("note:" in line for line in preflight.check(settings, [], {}, None))
    monkeypatch.setattr(container, "image", lambda: True)
    monkeypatch.setattr(container, "lost", lambda folder, root=None: "it lies in a volume without a name")
    (note,) = (line for line in preflight.check(settings, [], {}, None) if "note:" in line)
    assert "goes away with this container" in note
    assert f'docker run --gpus all -v "$PWD/out:{tmp_path}/out" -v "$PWD/cache:/cache" IMAGE' in note
    assert container.another(Path("/outputs")) == '-v "$PWD/outputs-2:/outputs"'
    with pytest.raises(MachineError, match=r"would go away.*-v \"\$PWD:/work\" -w /work.*Or set MODEL_REVISION=abc"):
        lock_inputs.write(tmp_path / ".env", {"MODEL_REVISION": "abc"})
    assert not (tmp_path / ".env").exists()


@pytest.mark.parametrize(
    ("made", "environ", "texts"),
    [
        ({"_dot_dockerenv": "", "proc__self__uid_map": IDENTITY}, {}, ["--user $(id -u):$(id -g)", '-v "$PWD/outputs:/outputs"']),
        ({"run__.containerenv": "", "proc__self__uid_map": PODMAN}, {}, ["--userns=keep-id", ":U", "label=disable"]),
        ({"_dot_dockerenv": "", "proc__self__uid_map": PODMAN}, {}, ["--user 0:0"]),
        ({}, {"KUBERNETES_SERVICE_HOST": "x"}, ["fsGroup"]),
        ({}, {"APPTAINER_CONTAINER": "x"}, ['--bind "$PWD/outputs:/outputs"']),
    ],
)  # fmt: skip
def test_who_may_write_depends_on_what_runs_the_container(
    tmp_path: Path, made: dict[str, str], environ: dict[str, str], texts: list[str]
) -> None:
    said = container.owner(environ, Path("/outputs"), root(tmp_path, **made))
    assert all(text in said for text in texts) and "/tmp" not in said, said


V1 = "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n3:pids:/docker/abc\n"


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({}, (None, None, None)),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__memory.max": "734003200\n", "sys__fs__cgroup__cpu.max": "50000 100000\n", "sys__fs__cgroup__pids.max": "10\n", "sys__fs__cgroup__pids.current": "3\n"}, (734003200, 1, 7)),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__memory.max": "max\n", "sys__fs__cgroup__cpu.max": "max 100000\n", "sys__fs__cgroup__pids.max": "max\n", "sys__fs__cgroup__pids.current": "3\n"}, (None, None, None)),
        ({"proc__self__cgroup": "0::/system.slice/job/step\n", "sys__fs__cgroup__system.slice__job__memory.max": "1000\n", "sys__fs__cgroup__system.slice__job__step__memory.max": "2000\n", "sys__fs__cgroup__system.slice__job__step__cpu.max": "max 100000\n"}, (1000, None, None)),
        ({"proc__self__cgroup": V1, "sys__fs__cgroup__memory__memory.limit_in_bytes": "1000\n", "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_quota_us": "100000\n", "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_period_us": "100000\n", "sys__fs__cgroup__pids__pids.max": "10\n", "sys__fs__cgroup__pids__pids.current": "4\n"}, (1000, 1, 6)),
        ({"proc__self__cgroup": V1, "sys__fs__cgroup__memory__memory.limit_in_bytes": "9223372036854771712\n", "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_quota_us": "-1\n", "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_period_us": "100000\n"}, (None, None, None)),
    ],
)  # fmt: skip
def test_limits_of_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: dict[str, str], expected: tuple[int | None, ...]
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    where = root(tmp_path, **made)
    assert (limits.memory(where), limits.cpus(where), limits.pids(where)) == expected


def test_too_little_memory_and_too_few_processes_are_refused_with_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.from_env({"OUTPUT_DIR": str(tmp_path / "out"), "MODEL_NAME": "org/some-100M"})
    monkeypatch.setattr(limits, "memory", lambda: 700 * 2**20)
    monkeypatch.setattr(limits, "pids", lambda: 10)
    with pytest.raises(MachineError) as caught:
        preflight.check(settings.replaced(load_in_4bit=False), [], {}, 100_000_000)
    assert all(
        text in str(caught.value) for text in ("at least 1.1 GiB", "0.7 GiB", "137", "--memory 2g", "--pids-limit")
    )
    (little,) = memory.too_small(
        settings, None, False
    )  # with one process it needs 0.7 GiB, which is still more than 700 MiB
    assert "at least 0.9 GiB" in little and "DATASET_NUM_PROC" not in little
    # 8B in 4 bits are 3.7 GiB, and not the 30 of float32
    assert memory.forecast_gib(settings, 8 * 10**9, False) == pytest.approx(4.4, abs=0.1)
    # on a GPU the weights do not lie in the host's memory, and more processes need more
    assert list(memory.too_small(settings.replaced(dataset_num_proc=1), 10**9, True)) != []
    monkeypatch.setattr(limits, "memory", lambda: 2**31)
    assert list(memory.too_small(settings, 10**9, True)) == []
    (many,) = memory.too_small(settings.replaced(dataset_num_proc=16), None, True)
    assert "DATASET_NUM_PROC=1 (then 1.3 GiB)" in many


def test_a_folder_from_which_no_program_is_loaded_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.runs_programs(tmp_path / "absent")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("only root may mount")
    try:
        assert not files.runs_programs(tmp_path / "absent")
        environ = {**smi(Path("/dev/shm"), H100), "TRITON_CACHE_DIR": str(tmp_path)}
        settings = Settings.from_env({"OUTPUT_DIR": "/dev/shm/out", "MODEL_NAME": "org/some-1M", "SAVE_MERGED": "0"})
        monkeypatch.setattr(cuda, "problems", lambda *_: [])
        with pytest.raises(MachineError, match=r"TRITON_CACHE_DIR=.*noexec.*--tmpfs /tmp:exec"):
            preflight.check(settings, gpus(environ), environ, None)
        made = environment.variables(settings, environ)  # so the run itself takes another place
        assert made["TRITON_CACHE_DIR"].startswith(f"{tempfile.gettempdir()}/finetune-cache-")
        assert "TRITON_CACHE_DIR hold no programs (mounted noexec)" in capsys.readouterr().out
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("variables", "texts"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "nowhere"}, ["WORLD_SIZE=2", "one replica"]),
        ({"RANK": "16"}, ["RANK=16", "LORA_R=16"]),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, ["OMPI_COMM_WORLD_SIZE=4", "OMPI_COMM_WORLD_RANK=3"]),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "0"}, ["PET_NNODES=2"]),
    ],
)  # fmt: skip
def test_one_of_several_processes_is_refused(variables: dict[str, str], texts: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        launcher.alone(variables, {})
    assert all(text in str(caught.value) for text in texts) and len(caught.value.problems) <= 2


def test_a_launcher_of_one_process_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """accelerate would wait for MASTER_ADDR, take another device, or compute in a precision that no record holds."""
    odd = dict(
        WORLD_SIZE="1", RANK="0", LOCAL_RANK="zero", MASTER_ADDR="nowhere", ACCELERATE_MIXED_PRECISION="fp8", FSDP_OFFLOAD_PARAMS="1",
        PET_NPROC_PER_NODE="auto", SM_FRAMEWORK_PARAMS="no json", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="x",
    )  # fmt: skip
    process = {**odd, "PATH": "/bin"}
    assert launcher.alone({**odd, "MAX_STEPS": "3", "HF_HOME": "/cache"}, process) == {
        "MAX_STEPS": "3",
        "HF_HOME": "/cache",
    }
    assert process == {"PATH": "/bin"} and ", ".join(sorted(odd)) in capsys.readouterr().out


def test_threads_follow_the_quota_unless_they_are_given() -> None:
    settings = Settings.from_env({})
    assert "OMP_NUM_THREADS" not in environment.variables(settings, {"HOME": "/tmp"})
    limited = environment.variables(settings, {"HOME": "/tmp"}, 1)
    assert limited["OMP_NUM_THREADS"] == limited["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    # as `reproduce` gives it: the record's number decides how sums are split
    assert environment.variables(settings, {"HOME": "/tmp", "OMP_NUM_THREADS": "4"}, 1)["OMP_NUM_THREADS"] == "4"
