"""OUTPUT_DIR: one run at a time, and an old one stays until the new one can begin."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import conftest
from finetune import files
from finetune.errors import MachineError, OutputError, Refusal, SettingsError
from finetune.run import folder, recipe
from finetune.settings import Settings


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with folder.locked(output):
        with pytest.raises(MachineError, match="another run is writing there"), folder.locked(output):
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
    with pytest.raises(OutputError, match=r"identity\.json: cannot be read"):
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


OLD = {"adapter/weights": "a", "merged/weights": "m", "checkpoints/identity.json": "{}", "run.json": "{}", "README.md": "r"}  # fmt: skip


def old_run(output: Path, *without: str) -> dict[str, str]:
    """Files of an old run in `output`, and beside it one that is nobody's."""
    kept = {name: text for name, text in {**OLD, "mine.txt": "mine"}.items() if not name.startswith(without or ("-",))}
    for name, text in kept.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text)
    return kept


def content(output: Path) -> dict[str, str]:
    return {str(p.relative_to(output)): p.read_text() for p in output.rglob("*") if p.is_file()}


def test_overwrite_unlinks_links_and_leaves_what_they_lead_to(tmp_path: Path) -> None:
    output, large = tmp_path / "out", tmp_path / "large"
    old_run(output)
    for name in ("adapter", "merged", "checkpoints"):
        (output / name).rename(tmp_path / name)
        (output / name).symlink_to(tmp_path / name)
    (output / "report.html").symlink_to(large / "gone")
    folder.claim(settings(output, OVERWRITE="1"), output, {"a": 1})
    assert sorted(path.name for path in output.iterdir()) == ["checkpoints", "mine.txt"]
    assert (
        not (output / "checkpoints").is_symlink() and (tmp_path / "checkpoints" / "identity.json").read_text() == "{}"
    )
    assert (tmp_path / "adapter" / "weights").read_text() == "a" and (
        tmp_path / "merged" / "weights"
    ).read_text() == "m"


def test_a_folder_is_published_over_a_link_which_alone_goes(tmp_path: Path) -> None:
    for name in ("large", "merged.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / "merged").symlink_to("large")
    (tmp_path / "merged.old").symlink_to("large")
    files.publish(tmp_path / "merged.partial", tmp_path / "merged")
    assert content(tmp_path) == {"large/weights": "large", "merged/weights": "merged.partial"}
    assert not (tmp_path / "merged").is_symlink() and not (tmp_path / "merged.old").is_symlink()


@pytest.mark.parametrize("without", [(), ("checkpoints",)])
def test_a_claim_that_is_killed_leaves_the_old_run_whole_or_the_new_one_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...]
) -> None:
    """Killed at every call that changes the disk, one after the other, and killed again while that is mended."""

    class Killed(BaseException):
        pass

    def changes(output: Path, left: int, act: Any) -> bool:
        """Run `act`, which dies at the change number `left`; whether it came to its end."""
        counted = [left]

        def dying(real: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                if counted[0] <= 0:  # the dead do nothing any more
                    raise Killed
                counted[0] -= 1
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                act()
            except Killed:
                return False
        return True

    seen = set()
    for at in range(100):
        for again in range(12):
            output = tmp_path / f"{at}-{again}"
            old = old_run(output, *without)
            ended = changes(output, at, lambda o=output: folder.claim(settings(o, OVERWRITE="1"), o, {"new": 1}))
            changes(output, again, lambda o=output: folder._settle(o))
            with folder.locked(output):
                found = content(output)
            new = {"mine.txt": "mine", folder.IDENTITY: '{\n  "new": 1\n}\n'}
            assert found == (new if ended else found) and found in (old, new), (at, again)
            assert not (output / folder.ASIDE).exists() and not (output / "checkpoints.partial").exists()
            seen.add(found == old)
        if ended:
            break
    assert seen == {True, False} and at > 10


def test_what_cannot_be_moved_is_named_and_the_old_run_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount point, as Docker makes one of -v /large:/outputs/merged. (No test may mount: the system's answer is given here.)"""
    old, real = old_run(tmp_path), os.rename

    def rename(path: Any, to: Any) -> None:
        if Path(path) == tmp_path / "merged":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        real(path, to)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(MachineError, match=r"/merged: cannot be moved .*busy.* OUTPUT_DIR=.*unmount merged"):
        folder.claim(settings(tmp_path, OVERWRITE="1"), tmp_path, {})
    assert content(tmp_path) == old and not (tmp_path / folder.ASIDE).exists()


def test_verify_after_a_killed_claim_finds_the_old_run(tmp_path: Path) -> None:
    old_run(tmp_path)
    (tmp_path / folder.ASIDE).mkdir()
    (tmp_path / "checkpoints").rename(tmp_path / folder.ASIDE / "checkpoints")
    (tmp_path / "run.json").rename(tmp_path / folder.ASIDE / "run.json")
    with pytest.raises(OutputError, match="schema_version"):  # and not: holds no finished run
        folder.finished(tmp_path)
    assert (tmp_path / folder.IDENTITY).is_file()


def input_in(output: Path, *, links: bool) -> list[tuple[str, Path]]:
    """Inputs that a run in `output` would replace. links: also through links."""
    beside = output.parent
    for name in ("merged", "adapter.old"):
        (output / name).mkdir(parents=True)
        (output / name / "config.json").write_text("{}")
    (output / "checkpoints").mkdir()
    (output / "checkpoints" / "rows.jsonl").write_text("{}")
    (output / "samples.md").write_text("{} {} {}")
    found = [
        ("MODEL_NAME", output / "merged"), ("MODEL_NAME", output / "adapter.old"), ("DATASET_NAME", output / "checkpoints" / "rows.jsonl"), ("EVAL_DATASET_NAME", output / "checkpoints" / "rows.jsonl"),
        ("PROMPT_TEMPLATE", output / "samples.md"), ("DATASET_NAME", output / "checkpoints"), ("MODEL_NAME", output),
        ("DATASET_NAME", Path(f"{beside}/a.jsonl,{output}/checkpoints/rows.jsonl")), ("DATASET_NAME", output / "*" / "r*.jsonl"),
    ]  # fmt: skip
    if links:
        (beside / "first").symlink_to("second")
        (beside / "second").symlink_to(output)
        (beside / "model").mkdir()
        (beside / "model" / "config.json").symlink_to(output / "merged" / "config.json")
        (beside / "large" / "model").mkdir(parents=True)
        (output / "adapter").symlink_to(beside / "large")
        (beside / "circle").symlink_to("circle")
        found += [
            ("MODEL_NAME", beside / "first" / "merged"), ("MODEL_NAME", beside / "second"), ("MODEL_NAME", beside / "model"),
            ("MODEL_NAME", beside / "large" / "model"), ("MODEL_NAME", output / "adapter"), ("MODEL_NAME", output / "adapter" / "model"),
        ]  # fmt: skip
    return found


@pytest.mark.parametrize("through", ["", "link"])
def test_an_input_that_the_run_would_replace_is_refused(tmp_path: Path, through: str) -> None:
    output = tmp_path / "o"
    named = input_in(output, links=True)
    if through:
        (tmp_path / "link").symlink_to("o")
    for variable, path in named:
        (problem,) = folder.inputs(settings(tmp_path / (through or "o"), **{variable: str(path)}))
        assert problem.startswith(f"{variable}={path}: ") and "give another folder for the run" in problem
        assert "OVERWRITE" not in problem
    (output / "rows.jsonl").write_text("{}")
    (output / "base").mkdir()
    fine = {"MODEL_NAME": str(output / "base"), "DATASET_NAME": str(output / "rows.jsonl"), "PROMPT_TEMPLATE": str(tmp_path / "circle")}  # fmt: skip
    assert not list(folder.inputs(settings(tmp_path / (through or "o"), **fine)))
    assert not list(folder.inputs(settings(tmp_path / "fresh", MODEL_NAME=str(output / "merged"))))
    assert not list(folder.inputs(settings(output, DATASET_NAME="samples")))


@pytest.mark.parametrize("verb", ["train", "check"])
@pytest.mark.parametrize("overwrite", ["0", "1"])
def test_nothing_is_read_or_taken_away_where_inputs_would_be_replaced(
    tmp_path: Path, verb: str, overwrite: str
) -> None:
    output = tmp_path / "o"
    input_in(output, links=False)
    (output / "merged" / "model.safetensors").write_bytes(b"damaged")
    before = content(output)
    values = dict(MODEL_NAME=output / "merged", DATASET_NAME=output / "checkpoints" / "rows.jsonl", OVERWRITE=overwrite)
    answer = conftest.call(verb, OUTPUT_DIR=output, **values)
    assert answer.returncode == 2 and "Traceback" not in answer.stderr, answer.stderr
    assert "error: MODEL_NAME=" in answer.stderr and "error: DATASET_NAME=" in answer.stderr
    assert "OVERWRITE" not in answer.stderr and content(output) == before
