"""A repository's own code is never run, and nobody is asked whether it may."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import QUICK, ROOT, environment

CONFIG = """
import pathlib

pathlib.Path(r"{mark}").write_text("ran")
from transformers import {base}


class Strange({base}):
    model_type = "strange"
"""


def _answering_yes(*words: str, **values: object) -> tuple[int, str]:
    """Exit code and all output of the entrypoint at a terminal on which somebody answers y to everything."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "entrypoint.py"), *words], stdin=slave, stdout=slave, stderr=slave, env=environment(**values),
        cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    os.write(master, b"y\n" * 20)
    said, limit = b"", time.monotonic() + 240
    while time.monotonic() < limit:
        if select.select([master], [], [], 1)[0]:
            try:
                said += os.read(master, 65536)
            except OSError:  # the other end is closed
                break
        elif process.poll() is not None:
            break
    os.close(master)
    return process.wait(30), said.decode(errors="replace")


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_neither_run_nor_asked_for(llama: Path, tmp_path: Path, place: str) -> None:
    base, mark = tmp_path / "base", tmp_path / "ran"
    shutil.copytree(llama, base)
    values = json.loads((base / place).read_text())
    if place == "config.json":
        values |= dict(
            model_type="strange", auto_map=dict(AutoConfig="code.Strange", AutoModelForCausalLM="code.Strange")
        )
        code = CONFIG.format(mark=mark, base="PretrainedConfig")
    else:
        values |= dict(tokenizer_class="Strange", auto_map=dict(AutoTokenizer=[None, "code.Strange"]))
        code = CONFIG.format(mark=mark, base="PreTrainedTokenizerFast")
    (base / place).write_text(json.dumps(values))
    (base / "code.py").write_text(code)
    code_ended, said = _answering_yes("train", **{**QUICK, "MODEL_NAME": base, "OUTPUT_DIR": tmp_path / "out"})
    assert not mark.exists() and "[y/N]" not in said and "Traceback" not in said, said
    assert "trust_remote_code" not in said
    if place == "config.json":
        assert code_ended == 2 and "code of its own, which this program never runs" in " ".join(said.split()), said
    else:  # tokenizer.json is read without it
        assert code_ended == 0 and "tokenizer.json is read as it is" in said, said


def test_every_library_is_told_to_run_no_code() -> None:
    """Each call that loads by a folder's configuration says so itself: without the word transformers asks at a terminal."""
    lacking = []
    for file in sorted((ROOT / "finetune").rglob("*.py")):
        text = file.read_text()
        for name in ("AutoConfig.from_pretrained(", "AutoModelForCausalLM.from_pretrained(", "AutoTokenizer.from_pretrained(", "AutoModelForCausalLM.from_config(", "FastLanguageModel.from_pretrained("):  # fmt: skip
            for part in text.split(name)[1:]:
                if "trust_remote_code=False" not in part[:600].split("\n\n")[0] and not part.startswith(
                    ("FOLDER", "BASE")
                ):
                    lacking.append(f"{file.name}: {name}")
    assert not lacking
