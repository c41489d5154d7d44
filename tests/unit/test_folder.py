"""OUTPUT_DIR: one run at a time, and an old one stays until the new one can begin."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from finetune import folder, recipe
from finetune.errors import PreflightError, Refusal, SettingsError
from finetune.settings import Settings


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with folder.locked(output):
        with pytest.raises(PreflightError, match="another run is writing there"), folder.locked(output):
            pass
        assert output.is_dir()
    assert not output.exists()  # nothing came into it
    with folder.locked(output):
        (output / "run.json").write_text("{}")
    assert (output / "run.json").is_file()


def test_a_child_that_outlives_its_run_keeps_no_lock(tmp_path: Path) -> None:
    begun, begins = os.pipe()
    with folder.locked(tmp_path):
        child = os.fork()
        if not child:
            os.write(begins, b"1")
            signal.pause()
        os.read(begun, 1)
    try:
        with folder.locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def settings(output: Path, **values: str) -> Settings:
    return Settings.from_env({"OUTPUT_DIR": str(output), **values})


def test_a_run_is_complete_with_all_that_is_asked_for(tmp_path: Path) -> None:
    identity = {"engine": "a test"}
    assert not folder.begin(settings(tmp_path), tmp_path, identity)
    folder.claim(settings(tmp_path), tmp_path, identity)
    assert not folder.begin(settings(tmp_path), tmp_path, identity)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    assert folder.begin(settings(tmp_path, SAVE_MERGED="0"), tmp_path, identity)
    assert not folder.begin(settings(tmp_path), tmp_path, identity)
    (tmp_path / "merged").mkdir()
    assert folder.begin(settings(tmp_path), tmp_path, identity)
    with pytest.raises(SettingsError, match="engine: was a test, is now another"):
        folder.begin(settings(tmp_path), tmp_path, {"engine": "another"})
    (tmp_path / folder.IDENTITY).write_text("{")
    with pytest.raises(SettingsError, match=r"identity\.json: cannot be read"):
        folder.begin(settings(tmp_path), tmp_path, identity)


@pytest.mark.parametrize("wrong", [{"TARGET_MODULES": "query"}, {"MAX_SEQ_LENGTH": "16", "TRAIN_ON": "response"}])
def test_overwrite_takes_nothing_away_before_all_that_can_refuse_has(
    llama: Path, tmp_path: Path, wrong: dict[str, str]
) -> None:
    old = ["adapter/adapter_model.safetensors", "merged/model.safetensors", "run.json", folder.IDENTITY]
    for name in old:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    values = dict(
        MODEL_NAME=str(llama), DATASET_NAME="samples", OVERWRITE="1", MAX_NEW_TOKENS="0", MAX_SEQ_LENGTH="256"
    )
    with pytest.raises(Refusal):
        recipe.run(settings(tmp_path, **values | wrong), {})
    assert all((tmp_path / name).read_text() == "old" for name in old)
    folder.claim(settings(tmp_path, OVERWRITE="1"), tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


def test_a_run_that_is_being_completed_does_not_count_as_complete(tmp_path: Path) -> None:
    """Killed between the merged weights and run.json, it would be complete for good, with a record that lacks them."""
    folder.claim(settings(tmp_path), tmp_path, {})
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    assert not folder.begin(settings(tmp_path), tmp_path, {})
    folder.claim(settings(tmp_path), tmp_path, {})
    (tmp_path / "merged").mkdir()
    assert not folder.begin(settings(tmp_path), tmp_path, {})
