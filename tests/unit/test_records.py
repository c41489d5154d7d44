"""Reading a record: what is refused, what is restored; and the verdict on two records."""

from __future__ import annotations

import copy
import functools
import json
import operator
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import ROOT, call, schema_errors
from finetune import files
from finetune.errors import NotReproduced, OutputError, Refusal, SettingsError
from finetune.run import folder, inputs, provenance, restore
from finetune.run import record as records
from finetune.settings import Settings
from finetune.verbs import reproduce

SHA = "0123456789abcdef" * 4
TEXT = " \"in quotes\", 'both', with a comma "


def record(**settings: Any) -> dict[str, Any]:
    """The committed run.json, with settings that a program can have and the hashes of few files."""
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "smoke-cpu" / "run.json").read_bytes())
    given = {
        "NUM_TRAIN_EPOCHS": "1.5",
        "DATASET_NAME": "org/rows",
        "PUSH_TO_HUB": "1",
        "HUB_MODEL_ID": "org/out",
        "HF_TOKEN": "x",
        "REPORT_TO": "wandb",
        "OVERWRITE": "1",
        "TARGET_MODULES": "q_proj,v_proj",
    }
    found["settings"] = {**Settings.from_env(given).record(), "SAMPLE_QUESTION": TEXT, **settings}
    found["model"]["commit"] = "a" * 40
    found["training"]["losses"] = [2.0, 1.5, 1.25]
    found["environment"] |= {"cpu_threads": 3, "packages": {"torch": "2"}, "variables": {"MKL_CBWR": "AVX2"}}
    names = ("adapter/adapter_model.safetensors", "merged/model.safetensors", "run.md")
    found["files"] = {name: {"sha256": SHA, "bytes": 1} for name in names}
    return found


def written(folder: Path, content: Any) -> Path:
    path = folder / "run.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_settings_come_from_the_record_and_the_line_alone(tmp_path: Path) -> None:
    path = written(tmp_path, record())
    environ = {"SEED": "9", "HF_TOKEN": "secret", "HF_HOME": "/cache", "MKL_CBWR": "other", "ATEN_CPU_CAPABILITY": "avx2", "TOLERANCE": "1"}  # fmt: skip
    layered, line = restore.restore(path, environ, {"LORA_R": "4"})
    assert layered == {"HF_TOKEN": "secret", "HF_HOME": "/cache", "MKL_CBWR": "AVX2", "OMP_NUM_THREADS": "3"}
    settings = Settings.from_env(layered, line)
    wanted = {
        **record()["settings"],
        "LORA_R": 4,
        "ENGINE": "transformers",
        "MODEL_REVISION": "a" * 40,
        "PUSH_TO_HUB": False,
    }
    wanted |= {"HUB_MODEL_ID": None, "REPORT_TO": "none", "OVERWRITE": False, "OUTPUT_DIR": f"{tmp_path}-reproduced"}
    assert settings.record() == wanted and settings.sample_question == TEXT


def test_a_record_older_than_held_out_rows_held_none_out(tmp_path: Path) -> None:
    old, new = record(), record()
    for name in [name for name in old["settings"] if name.startswith(("EVAL_", "EARLY_", "LOAD_BEST"))]:
        del old["settings"][name]
    settings = Settings.from_env(*restore.restore(written(tmp_path, old), {}, {}))
    assert settings.eval_rows == 0 and settings.eval_split == "auto"
    new["settings"]["EVAL_ROWS"] = 0
    assert not reproduce.differences(old, new)  # type: ignore[arg-type]
    new["settings"]["EVAL_ROWS"] = 64
    assert reproduce.differences(old, new) == [("setting EVAL_ROWS", "0", "64")]  # type: ignore[arg-type]


def test_a_record_under_another_name_has_a_folder_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, record()).rename(tmp_path / "smoke.json")
    assert restore.restore(path, {}, {})[1]["OUTPUT_DIR"] == str(tmp_path / "smoke-reproduced")


@pytest.mark.parametrize("given", ["{}", "{}/../{}", "{}/sub", "{}/adapter/../new/sub"])
def test_the_folder_of_the_record_is_never_written_to(tmp_path: Path, given: str) -> None:
    path = written(tmp_path, record())
    with pytest.raises(SettingsError, match="the recorded run's folder"):
        restore.restore(path, {}, {"OUTPUT_DIR": given.format(tmp_path, tmp_path.name), "OVERWRITE": "1"})
    beside = restore.restore(path, {}, {"OUTPUT_DIR": f"{tmp_path}-2"})[1]["OUTPUT_DIR"]
    assert beside == f"{tmp_path}-2"


@pytest.mark.parametrize("given", ["~/outputs", "'~/outputs'", '"{}"', ""])
def test_the_folder_of_the_record_is_known_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """A shell leaves ~ behind a = as it is, and an empty value is the default."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    path = written(tmp_path / "outputs", record())
    with pytest.raises(SettingsError, match="the recorded run's folder"):
        restore.restore(path, {}, {"OUTPUT_DIR": given.format(path.parent)})


def test_nothing_is_pushed(tmp_path: Path) -> None:
    path = written(tmp_path, record())
    with pytest.raises(SettingsError, match="publishes nothing"):
        restore.restore(path, {}, {"PUSH_TO_HUB": "yes"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["cannot be read as JSON"]),
        ("[]", ["no schema_version"]),
        ("{}", ["no schema_version"]),
        (
            {"schema_version": 2, "environment": {"program": "0.1.0", "revision": "abc"}},
            ["schema_version 2", "revision abc"],
        ),
        ({"schema_version": 99, "environment": 5}, ["schema_version 99"]),
        ("[" * 100_000, ["cannot be read as JSON"]),
        ({"schema_version": 4}, ["schema_version 4, and this program reads 3"]),
        ({"schema_version": "\ud800"}, ['schema_version "\\ud800"']),
        ({**record(), "files": {"run.md": {"sha256": SHA, "bytes": 1}}}, ["the record lists no weights"]),
        (
            {**record(), "model": {"commit": 1}, "training": []},
            ["model.commit is 1; it takes a text", "model.files is missing", "training is a list; it takes an object"],
        ),
    ],
)
def test_records_that_cannot_be_used(tmp_path: Path, content: Any, words: list[str]) -> None:
    path = written(tmp_path, content)
    with pytest.raises(SettingsError) as caught:
        restore.restore(path, {}, {})
    assert all(word in str(caught.value) for word in [*words, str(path)]), caught.value


def test_no_record_at_all(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"run\.json: there is no such file"):
        restore.restore(tmp_path, {}, {})


def test_a_record_that_names_a_secret_or_another_setting_is_refused_before_a_file_is_read(tmp_path: Path) -> None:
    """It may be a stranger's, and the file's content would be sent to the Hub as the token."""
    os.mkfifo(tmp_path / "private")  # whoever reads it waits without end
    odd = dict(
        HF_TOKEN_FILE=str(tmp_path / "private"), WANDB_API_KEY="opensesame", hf_token="opensesame", FROM_LATER="1"
    )
    path = written(tmp_path, record(**odd))
    for words, code in ((["reproduce", str(path)], 2), (["verify", str(tmp_path)], 5)):
        answer = call(*words, timeout=60)
        assert answer.returncode == code and all(f"settings holds {name}; it takes" in answer.stderr for name in odd)
        assert "opensesame" not in answer.stderr and "private" not in answer.stderr


def changed(losses: list[float] | None = None, sha: str = "f" * 64, **settings: Any) -> dict[str, Any]:
    made = copy.deepcopy(record(**settings))
    made["files"]["adapter/adapter_model.safetensors"]["sha256"] = sha
    made["training"]["losses"] = losses or made["training"]["losses"]
    return made


def test_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = record()
    moved = changed(sha=SHA, MODEL_NAME="/elsewhere", OUTPUT_DIR="/there")
    moved["environment"]["packages"]["torch"] = "3"
    said = reproduce.judge(tmp_path, old, moved, None)
    assert "REPRODUCED" in said and "without effect" in said and "package torch  2  3" in said and said.count(SHA) == 2
    with pytest.raises(NotReproduced):
        reproduce.judge(tmp_path, old, changed([2.0, 1.515, 1.25]), None)
    assert "first difference at step 2: recorded 1.5, here 1.515, relative difference 0.0099; the largest" in capsys.readouterr().out  # fmt: skip
    assert "WITHIN TOLERANCE" in reproduce.judge(tmp_path, old, changed([2.0, 1.515, 1.25]), 0.01)
    for made, tolerance in (
        (changed([2.0, 1.515, 1.25]), 0.009), (changed([2.0, 1.5]), 0.01), (changed([2.0, 1.515, 1.25], LORA_R=4), 0.01),
        (changed(), None),
    ):  # fmt: skip
        with pytest.raises(NotReproduced):
            reproduce.judge(tmp_path, old, made, tolerance)
    assert "losses: equal in all 3 steps" in capsys.readouterr().out


def test_a_missing_shard_is_a_difference(tmp_path: Path) -> None:
    made = changed(sha=SHA)
    made["files"]["merged/model-00002-of-00002.safetensors"] = {"sha256": SHA, "bytes": 1}
    with pytest.raises(NotReproduced):
        reproduce.judge(tmp_path, record(), made, None)


@pytest.mark.parametrize("content", ["[]", '"text"', "{", "7", "[" * 100_000, b"\xff\xfe{", '{"schema_version": 99}'])
def test_a_run_json_that_is_no_record_is_named(content: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        OutputError, match=r"run\.json: (cannot be read as JSON|is not the record|has schema_version 99)"
    ):
        folder.verify(tmp_path)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("settings", None),
        ("settings.MODEL_NAME", 5),
        ("settings.LOAD_IN_4BIT", "yes"),
        ("settings.PROMPT_COLUMNS", ["a", 5]),
        ("settings.PROMPT_TEMPLATE", []),
        ("engine", "unsloth"),
        ("engine.name", "tensorflow"),
        ("model", None),
        ("model.files", []),
        ("model.files", {"config.json": 5}),
        ("model.commit", {}),
        ("dataset.format", False),
        ("dataset.format", "no such"),
        ("training.plan", 5),
        ("training.plan.micro_batch", 0),
        ("training.plan.accumulation", True),
        ("training.plan.layers", "30"),
        ("training.plan.forecast_gib", "1"),
        ("training.plan.dequantized", 1),
        ("training.losses", ["a"]),
        ("training.losses", [1.5, None]),
        ("training.losses", {}),
        ("training.losses", []),
        ("environment.cpu_threads", 0),
        ("environment.variables", {"SEED": 1}),
        ("environment.variables", {"lower": "1"}),
        ("verification", []),
        ("files", []),
        ("files", {"a": None}),
        ("files", {"/etc/passwd": {"sha256": SHA, "bytes": 1}}),
        ("files", {"a/../../b": {"sha256": SHA, "bytes": 1}}),
        ("files", {"a": {}}),
        ("files", {"a": {"sha256": SHA, "bytes": "1"}}),
        ("files", {"a": {"sha256": 1, "bytes": 1}}),
    ],
)
def test_a_damaged_part_is_named_by_all_who_read_it_and_by_the_schema(part: str, value: Any, tmp_path: Path) -> None:
    whole = json.loads((ROOT / "benchmarks" / "smoke-cpu" / "run.json").read_bytes())
    *outer, last = part.split(".")
    inside = functools.reduce(operator.getitem, outer, whole)

    def check() -> None:
        assert schema_errors(whole)
        path = written(tmp_path, whole)
        for reader in (folder.finished, folder.verify, lambda output: restore.restore(output, {}, {})):
            with pytest.raises(Refusal) as caught:
                reader(tmp_path)
            assert caught.value.code == (5 if reader in (folder.finished, folder.verify) else 2)
            assert str(caught.value).startswith(f"{path}: {part}") and "it takes " in str(caught.value)
            assert caught.value.problems[-1].startswith(f"{path}: is not a whole record")

    inside[last] = value
    check()
    del inside[last]
    check()


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("training.losses", [float("nan")]),
        ("training.losses", [1.5, float("inf")]),
        ("training.losses", [10**400]),
        ("settings.LEARNING_RATE", float("nan")),
        ("settings.PROMPT_TEMPLATE", "\0"),
        ("settings.MODEL_NAME", "\ud800"),
        ("environment.variables", {"MKL_CBWR": "\0"}),
        ("environment.variables", {"MKL_CBWR": "\ud800"}),
        ("files", {"\0": {"sha256": SHA, "bytes": 1}}),
        ("timings.total_s", float("inf")),
    ],
)
def test_what_json_can_hold_and_no_run_can_write_is_named(part: str, value: Any, tmp_path: Path) -> None:
    """NaN passed any TOLERANCE where it was not the first difference."""
    whole = record()
    *outer, last = part.split(".")
    functools.reduce(operator.getitem, outer, whole)[last] = value
    written(tmp_path, whole)
    with pytest.raises(OutputError, match=rf"run\.json: {part}.* it takes (a|names)"):
        folder.finished(tmp_path)


def test_recorded_runs_are_read_and_older_ones_are_told_from_which_program() -> None:
    for path in (ROOT / "benchmarks" / "smoke-cpu").glob("*.json"):
        assert not schema_errors(records.read(path, SettingsError))
    with pytest.raises(
        SettingsError, match=r"has schema_version 2.* Use the program that wrote it \(version 0\.1\.0, rev"
    ):
        records.read(ROOT / "benchmarks" / "h100" / "whole-run.json", SettingsError)


def test_the_schema_is_made_of_the_description() -> None:
    """Of what a reader takes it takes more measurements, and no more of what decides."""
    assert json.loads((ROOT / "finetune" / "run.schema.json").read_bytes()) == records.schema(), "run: make env-example"
    whole = record()
    whole["files"] |= {name: {"sha256": SHA, "bytes": 1} for name in records.PAGES}
    whole["timings"]["more_s"], whole["training"]["more"], whole["more"] = 1.0, {}, {}
    assert not records.problems(whole) and not schema_errors(whole)
    for section in ("model", "dataset", "settings"):
        other = copy.deepcopy(whole)
        other[section]["more"] = 1
        assert records.problems(other) == [
            p for p in records.problems(other) if p.startswith(f"{section} holds more; ")
        ]
        assert records.problems(other) and schema_errors(other)


def test_what_no_reader_would_take_is_not_written() -> None:
    with pytest.raises(ValueError, match=r"run\.json: memory is missing"):
        records.made(**{name: part for name, part in record().items() if name != "memory"})


def test_every_kind_of_cpu_that_is_said_to_made_the_same_bytes() -> None:
    made = [records.read(path, SettingsError) for path in (ROOT / "benchmarks" / "smoke-cpu").glob("*.json")]
    assert len({record["environment"]["cpu"] for record in made}) == len(made) > 1
    assert len({json.dumps([records.weights(record), record["training"]["losses"]]) for record in made}) == 1


def test_tokens_are_only_spoken_of_where_rows_and_model_are_the_recorded_ones() -> None:
    wanted = {
        "model": {"commit": None, "files": {"config.json": SHA}},
        "dataset": {"sha256": SHA, "tokens_sha256": SHA},
    }

    def refused(model: str, tokens: str) -> str:
        source = SimpleNamespace(name="base", commit=None, digests={"config.json": model})
        parts: list[Any] = [
            source,
            SimpleNamespace(name="rows.jsonl", sha256=SHA),
            SimpleNamespace(sha256=tokens, date=None, held_out=None),
        ]
        with pytest.raises(SettingsError) as caught:
            inputs.check(*parts, wanted)
        return str(caught.value)

    assert "MODEL_NAME=base" in refused("0", "0") and "tokens" not in refused("0", "0")
    assert refused(SHA, "0").startswith("tokens: ")


def test_the_lock_of_a_record_is_the_one_that_was_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    beside = files.sha256(ROOT / "docker" / "requirements.txt")
    assert provenance.environment(None, {})["lock_sha256"] == beside  # an environment of the user's own
    other = files.sha256(ROOT / "docker" / "requirements-cu128.txt")
    (tmp_path / ".stamp-main").write_text(f"3.12 {other}  -\n")
    assert provenance.environment(None, {})["lock_sha256"] == other


def test_a_reproduction_does_not_replace_its_own_base(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "merged").mkdir(parents=True)
    (output / "merged" / "config.json").write_text("{}")
    (tmp_path / "record").mkdir()
    path = written(tmp_path / "record", record())
    answer = call("reproduce", str(path), f"OUTPUT_DIR={output}", f"MODEL_NAME={output}/merged", "DATASET_NAME=samples", "OVERWRITE=1")  # fmt: skip
    assert answer.returncode == 2 and "is inside a folder that a run in OUTPUT_DIR" in answer.stderr, answer.stderr
    assert (output / "merged" / "config.json").is_file() and not (output / "run.json").exists()
