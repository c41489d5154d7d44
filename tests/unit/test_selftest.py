"""The self-test: on a CPU what can run there; each failure with its remedy, also that of a process which ends in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import call
from fake_machine import H100, driver, smi
from finetune.errors import MachineError
from finetune.machine import cuda, selftest
from finetune.settings import Settings

# a module that takes the place of finetune.engines.selftest
CHILD = """
import json, os, sys, time
for name in sys.argv[1:]:
    if name == "Triton":
        print("first words", "Error no kernel image is available for execution on the device at line 42", sep="\\n", file=sys.stderr)
        os._exit(1)  # as bitsandbytes does
    if name == "attention":
        time.sleep(600)
    if name == "bitsandbytes":
        os.kill(os.getpid(), 9)  # as a machine does that has no memory left
    print(json.dumps(dict(name=name, good=name != "model", words="out of memory" if name == "model" else "fine", seconds=0.1)), flush=True)
"""


def test_on_a_cpu_all_that_can_run_is_right(tmp_path: Path) -> None:
    done = call("selftest", "ENGINE=transformers", OUTPUT_DIR=tmp_path)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and lines[-1][:3] == ["selftest:", "all", "7"], done.stdout + done.stderr
    tested = ["memory", "processors", "disk", "libraries", "products", "bitsandbytes", "model"]
    assert [(line[0], line[1]) for line in lines[:-1]] == [("ok", name) for name in tested]
    assert not done.stderr and not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_what_it_could_not_test_and_imports_no_torch(tmp_path: Path) -> None:
    done = call("selftest", OUTPUT_DIR=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 3 and "error: selftest: 1 of 4 tests failed: driver" in done.stderr
    assert "FAILED      driver" in done.stdout and "docker run --gpus all" in done.stdout
    assert "not tested  Triton" in done.stdout and "needs driver, which failed" in done.stdout
    assert " torch" not in done.stderr


def test_a_gpu_that_is_listed_and_cannot_compute_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", str(driver(tmp_path, 999)))
    tests = selftest.host(Settings.from_env({"OUTPUT_DIR": str(tmp_path)}), smi(tmp_path, H100))
    found = {result.name: result for result in selftest.results(tests)}
    assert found["driver"].good and not found["CUDA"].good and "CUDA does not start" in found["CUDA"].words
    assert found["disk"].good and "MB/s" in found["disk"].words


def test_a_process_that_ends_or_hangs_costs_one_test_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "child_of_a_test.py").write_text(CHILD)
    monkeypatch.setattr(selftest, "PATIENCE", 2)
    environ = {**smi(tmp_path, H100, H100.replace("0, GPU-aa", "1, GPU-bb")), "PYTHONPATH": str(tmp_path)}
    began = [selftest.Result("driver", True, ""), selftest.Result("CUDA", True, "")]
    found = list(selftest.with_torch("child_of_a_test", environ, began))
    bad = {result.name: result.words for result in found if not result.good}
    assert [result.name for result in found] == [
        "libraries",
        "products",
        "GPU memory",
        "Triton",
        "bitsandbytes",
        "attention",
        "model",
        "NCCL",
    ]
    assert set(bad) == {"Triton", "bitsandbytes", "attention", "model"}
    assert "was killed" in bad["bitsandbytes"] and "Remedy: another program holds" not in bad["bitsandbytes"]
    assert "no kernel image" in bad["Triton"] and "Remedy: the libraries hold no code for this GPU" in bad["Triton"]
    assert "no end within 2 s" in bad["attention"] and "another program holds" in bad["model"]
    broken = [began[0], selftest.Result("CUDA", False, "")]
    assert all(r.good is None and "needs CUDA" in r.words for r in selftest.with_torch("none", environ, broken))


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("RuntimeError: CUDA error: no kernel image is available for execution on the device", "newer image"),
        ("ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'", "newer image"),
        ("RuntimeError: Failed to find C compiler. Please specify via CC environment variable.", "gcc"),
        ("ImportError: launcher.so: failed to map segment from shared object: Operation not permitted", "noexec"),
        ("OSError: libcudart.so.13: cannot open shared object file", "CUDA library"),
        ("DistBackendError: NCCL error in: ProcessGroupNCCL.cpp", "--shm-size"),
        ("CUDA error: uncorrectable ECC error encountered", "another machine"),
    ],
)
def test_what_libraries_say_comes_with_a_remedy(said: str, remedy: str) -> None:
    assert remedy in selftest.told(said).partition("Remedy: ")[2]


def test_of_a_compiler_s_error_the_place_and_the_reason_are_told() -> None:
    def test() -> str:
        raise ValueError("at 1:12:\n  def _add(a\n\nNameError('no such name')")

    (result,) = selftest.results({"Triton": test})
    assert result.words == "ValueError: at 1:12: … NameError('no such name')"


def test_numbers_that_are_wrong_are_a_failure() -> None:
    import torch

    from finetune.engines.selftest import near

    with pytest.raises(MachineError, match=r"a sum differs from the reference by .* wrong numbers"):
        near(torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0]), "a sum", 0.01)
    with pytest.raises(MachineError):
        near(torch.tensor([float("nan")]), torch.tensor([1.0]), "a sum", 0.01)
