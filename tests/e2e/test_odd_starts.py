"""The program started in odd ways: each ends with a sentence and the code of README, or works."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import QUICK, ROOT, environment

ENTRY = [sys.executable, str(ROOT / "entrypoint.py")]


def call(
    *words: str, cwd: Path | None = None, out: Any = subprocess.PIPE, before: Any = None, **values: Any
) -> tuple[int, str]:
    """Exit code, and all that was said; there is no traceback in it."""
    done = subprocess.run(
        [*ENTRY, *words], stdout=out, stderr=subprocess.PIPE, text=True, env=environment(**values), cwd=cwd, timeout=120,
        preexec_fn=before,
    )  # fmt: skip
    said = (done.stdout or "") + done.stderr
    assert "Traceback" not in said, said
    return done.returncode, said


def test_variables_of_python(llama: Path, tmp_path: Path) -> None:
    odd = dict(PYTHONOPTIMIZE="2", PYTHONSAFEPATH="1")
    code, said = call(**{**QUICK, "MODEL_NAME": llama, "OUTPUT_DIR": tmp_path / "out", "MAX_STEPS": 1, **odd})
    assert code == 0 and "verified" in said, said


@pytest.mark.parametrize("numbers", [(1,), (2,), (0, 1, 2)])
def test_a_closed_output(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    code, said = call("check", ENGINE="transformers", OUTPUT_DIR=tmp_path, before=lambda: [*map(os.close, numbers)])
    assert code == 0 and ("all good" in said) == (1 not in numbers), said
    assert not list(tmp_path.iterdir())


def test_a_working_directory_that_was_deleted(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code, said = call("check", cwd=gone, before=lambda: os.rmdir(gone))
    assert code == 3 and "has been deleted" in said, said


@pytest.mark.parametrize("name", ["OUTPUT_DIR", "MODEL_NAME", "DATASET_NAME", "PROMPT_TEMPLATE"])
def test_a_name_that_is_too_long(tmp_path: Path, name: str) -> None:
    code, said = call("check", f"{name}={tmp_path}/{'n' * 300}", MODEL_NAME=tmp_path)
    assert code == 2 and f"{name}: " in said and "too long" in said, said


@pytest.mark.parametrize("words", [["verify", "n" * 300], ["reproduce", "n" * 300], ["reproduce", "n/" * 3000]])
def test_a_word_that_is_too_long(words: list[str]) -> None:
    code, said = call(*words)
    assert code == 2 and "long" in said, said


def test_a_record_in_the_root_folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`reproduce /run.json`: there is no folder beside / to put the new run in, so it goes below it."""
    from finetune.run import restore

    monkeypatch.setattr(
        restore, "read", lambda _: (Path("/run.json"), restore.records.read(finished / "run.json", Exception))
    )  # type: ignore[arg-type]
    assert restore.restore(Path("/run.json"), {}, {})[1]["OUTPUT_DIR"] == "/run-reproduced"


def test_a_token_in_the_place_of_its_file() -> None:
    code, said = call("check", HF_TOKEN_FILE="hf_" + "secret" * 5)
    assert code == 2 and "HF_TOKEN_FILE" in said and "hf_secret" not in said, said


@pytest.mark.parametrize("words", [["check"], ["env"]])
def test_a_full_disk_behind_stdout(words: list[str], llama: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        code, said = call(
            *words, out=full, MODEL_NAME=llama, OUTPUT_DIR=tmp_path, DATASET_NAME="samples", DATASET_CONFIG="en"
        )
    assert code == 3 and "error: the disk is full" in said, said


def test_a_line_of_env_without_a_sign(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("# mine\nMAX_STEPS=3\nLEARNING_RATE 1e-4\nSEED\n")
    code, said = call("check", cwd=tmp_path)
    assert code == 2 and "line 3, 4" in said, said


def test_control_characters_of_a_value_do_not_reach_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b[2J\x1b]0;mine\x07\r\u202e"
    code, said = call("check", f"MODEL_NAME=./{evil}", f"MAX_STEPS={evil}")
    assert code == 2 and not {"\x1b", "\x07", "\r", "\u202e"} & set(said) and "\\x1b[2J" in said, said
    (tmp_path / "question.jsonl").write_text('{"\\u001b[2J": 1}\n')
    code, said = call("check", f"OUTPUT_DIR={tmp_path}/{evil}")
    assert "\x1b" not in said, said


def test_a_limit_of_the_address_space(llama: Path, tmp_path: Path) -> None:
    size = 3 * 2**29
    code, said = call(
        before=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
        **{**QUICK, "MODEL_NAME": llama, "OUTPUT_DIR": tmp_path / "out", "MAX_STEPS": 1},
    )
    assert code == 3 and "ulimit -v" in said, said


def test_a_bug_is_told_as_one_and_no_secret_is_in_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import entrypoint
    from finetune.verbs import check

    def fails(*_: object) -> None:
        raise ZeroDivisionError("with hf_topsecret at https://me:opensesame@host/x")

    monkeypatch.setattr(check, "run", fails)
    kept = dict(os.environ)
    try:
        code = entrypoint.main(["check"], environment(HF_TOKEN="hf_topsecret", FINETUNE_STATE_DIR=tmp_path))
    finally:
        os.environ.clear()
        os.environ.update(kept)
    said = capsys.readouterr().err
    assert (
        code == 1 and "Traceback" in said and said.splitlines()[-1].startswith("error: this is a bug of this program")
    ), said
    assert "hf_topsecret" not in said and "opensesame" not in said and "<SECRET>" in said


def test_wandb_without_a_network(llama: Path, tmp_path: Path) -> None:
    code, said = call(
        **{**QUICK, "MODEL_NAME": llama, "OUTPUT_DIR": tmp_path / "out", "MAX_STEPS": 1, "REPORT_TO": "wandb"},
        WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9", NO_PROXY="*",
    )  # fmt: skip
    assert code == 0 and "cannot be reached" in said and "wandb sync" in said, said
    assert "a" * 40 not in said
