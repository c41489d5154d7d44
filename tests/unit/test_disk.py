"""What the machine refuses to a program that reads or writes files is told as that, whoever met it."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import QUICK, ROOT, environment
from finetune.errors import of_machine


@pytest.mark.parametrize("limit", [100_000, 200_000])
def test_a_file_that_a_library_cannot_write_is_no_bug(llama: Path, tmp_path: Path, limit: int) -> None:
    """safetensors and torch.save have errors of their own for it: the adapter has 135 kB, the optimizer's state 279 kB."""
    values = {**QUICK, "MODEL_NAME": llama, "OUTPUT_DIR": tmp_path / "out", "SAVE_STEPS": 1}
    # Python would leave torch's byte code cut off at the limit, for all who come after
    values["PYTHONDONTWRITEBYTECODE"] = "1"
    answer = subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py"), "train"], capture_output=True, text=True, timeout=280, env=environment(**values),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert answer.returncode == 3 and "Traceback" not in answer.stderr, answer.stderr
    assert "File too large; raise the limit (ulimit -f)" in answer.stderr


def test_what_belongs_to_somebody_else_is_no_bug() -> None:
    sentence = of_machine(PermissionError(errno.EACCES, "Permission denied", "out/adapter/adapter_model.safetensors"))
    assert sentence is not None and sentence.startswith("out/adapter/adapter_model.safetensors: Permission denied; ")
    assert of_machine(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) is None
