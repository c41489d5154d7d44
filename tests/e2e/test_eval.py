"""What a run says of held-out rows, wherever it says it; and `eval` of the finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import schema_errors, train
from finetune import files
from finetune.errors import OutputError, Refusal, SettingsError
from finetune.run import evaluation, folder, measured, report
from finetune.settings import Settings
from finetune.verbs import eval as verb
from unit.test_held_out import file


@pytest.fixture(scope="module")
def home(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, `out`, of a file whose last rows are held out."""
    home = tmp_path_factory.mktemp("eval")
    (home / "template.txt").write_text("Q: {}\nA: {} {}\n")
    file(home / "rows.jsonl", range(200))
    values = dict(EVAL_STEPS=4, LEARNING_RATE=1e-2, WARMUP_STEPS=0, MAX_NEW_TOKENS=3, LOAD_BEST_MODEL_AT_END=1)
    train(llama, home / "out", DATASET_NAME=home / "rows.jsonl", DATASET_CONFIG="", PROMPT_TEMPLATE=home / "template.txt", MAX_STEPS=12, **values)  # fmt: skip
    return home


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(home / "out", tmp_path / "out"))


def evaluate(output: Path, **values: Any) -> dict[str, Any]:
    """What eval.json holds then."""
    verb.run(Settings.from_env({}, {"OUTPUT_DIR": str(output), **{k: str(v) for k, v in values.items()}}), {}, "")
    return dict(json.loads((output / "eval.json").read_text()))


def record(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "run.json").read_text()))


def test_the_sentence_stands_everywhere_and_the_figures_are_in_the_record(home: Path) -> None:
    found = record(home / "out")
    told = found["evaluation"]
    assert told["rows"] == len(told["each"]) == 10 and (told["duplicates"], told["dropped"]) == (0, 0)
    sentence = told["sentence"]
    assert sentence.startswith("On 10 held-out rows the loss fell from ")
    for name in ("report.html", "README.md", "adapter/README.md", "merged/README.md"):
        assert sentence in (home / "out" / name).read_text(), name
    assert sentence in report.summary(home / "out", found)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (home / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines if "eval_loss" in row] == [4, 8, 12]
    assert [point["step"] for point in told["course"]] == [0, 4, 8, 12]
    assert [point["loss"] for point in told["course"]][1:] == [row["eval_loss"] for row in lines if "eval_loss" in row]
    first, last, labels = ([row[name] for row in told["each"]] for name in ("before", "after", "labels"))
    assert measured.compare(first, last, labels).record() == {k: told[k] for k in ("before", "after", "change")}
    assert told["kept"] == 12 and told["best"] and not schema_errors(found)
    assert schema_errors({**found, "evaluation": {**told, "rows": 0}})
    assert not schema_errors({**found, "evaluation": None})


def test_eval_measures_what_the_run_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, told = files.digests(run), record(run)["evaluation"]
    found = evaluate(run)
    assert {name: value for name, value in files.digests(run).items() if name != "eval.json"} == before
    assert [row["row"] for row in found["each"]] == [row["row"] for row in told["each"]]
    for row, own in zip(found["each"], told["each"], strict=True):
        # measured in one piece and in others, of a model in 4 bits and one that is merged
        assert (row["base"], row["adapter"]) == pytest.approx((own["before"], own["after"]), rel=1e-4)
        assert row["merged"] == pytest.approx(row["adapter"], rel=2e-2) and row["labels"] == own["labels"]
    assert found["compared"]["adapter"]["change"]["loss"] == pytest.approx(told["change"]["loss"], rel=1e-3)
    assert found["tokens_sha256"] == told["tokens_sha256"]
    said = capsys.readouterr().out
    assert "loss of the base with the adapter fell from" in said and "loss of the merged weights fell" in said
    folder.verify(run)


def test_eval_takes_other_rows_and_leaves_out_trained_ones(
    home: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = file(home / "other.jsonl", range(185, 215))
    found = evaluate(run, EVAL_DATASET_NAME=other, EVAL_ROWS=20)
    assert found["rows"] == 20 and found["duplicates"] == 5  # 185 to 189 were trained
    assert found["each"][0]["row"].endswith("row 6 (line 6)")
    beside = evaluate(run, EVAL_SPLIT="train[180:195]")
    assert beside["rows"] == 5 and beside["duplicates"] == 10
    assert "10 left out as near-duplicates" in capsys.readouterr().out


def test_eval_without_the_data_that_was_trained(
    home: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = file(home / "more.jsonl", range(300, 320))
    whole = evaluate(run, EVAL_DATASET_NAME=other)
    (home / "rows.jsonl").rename(home / "moved.jsonl")
    try:
        found = evaluate(run, EVAL_DATASET_NAME=other)
        other.write_text(other.read_text() + json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
        with pytest.raises(SettingsError, match=r"^[^\n]*more.jsonl row 21 .* has no column"):
            evaluate(run, EVAL_DATASET_NAME=other)
        with pytest.raises(SettingsError, match=r"^DATASET_NAME=.*there is no such file"):
            evaluate(run)
    finally:
        (home / "moved.jsonl").rename(home / "rows.jsonl")
    assert "is not there, so near-duplicates of it are not looked for" in capsys.readouterr().out
    assert found["each"] == whole["each"] and found["tokens_sha256"] == whole["tokens_sha256"]


@pytest.mark.parametrize("part", ["adapter", "merged"])
def test_eval_of_what_is_left_of_a_run(run: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / part)
    found = evaluate(run)
    assert set(found["losses"]) == ({"merged"} if part == "adapter" else {"base", "adapter"})
    if part == "adapter":
        assert "only the merged weights are measured" in capsys.readouterr().out and not found["compared"]


def test_eval_says_what_keeps_it_from_measuring(home: Path, run: Path, tmp_path: Path) -> None:
    def refused(kind: type[Refusal], **values: Any) -> str:
        with pytest.raises(kind) as caught:
            evaluate(run, **values)
        assert not (run / "eval.json").exists() and not (run / "eval.json.partial").exists()
        return str(caught.value)

    assert "EVAL_DATASET_NAME=absent.jsonl: there is no such file" in refused(
        SettingsError, EVAL_DATASET_NAME="absent.jsonl"
    )
    assert "near-duplicates" in refused(SettingsError, EVAL_DATASET_NAME=file(tmp_path / "same.jsonl", range(10)))
    assert "EVAL_SPLIT=train[999:]" in refused(SettingsError, EVAL_SPLIT="train[999:]")
    weights = run / "merged" / "model-00001-of-00003.safetensors"
    whole, content = record(run), weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "is not the file that the run wrote" in refused(OutputError)
    weights.write_bytes(content)
    (run / "run.json").write_text(json.dumps({**whole, "evaluation": None}))
    assert "held no rows out" in refused(SettingsError)
    (run / "run.json").unlink()
    assert "holds no finished run" in refused(OutputError)


def test_held_out_questions_stand_beside_the_rows_own_answers(home: Path, llama: Path) -> None:
    from finetune.data.held_out import HeldOut, Question

    prompts = [f"Q: {question}\nA:" for question in ("Why?", "When <b>?")]
    questions = [Question(prompts[0], "So."), Question(prompts[1], "Now.")]
    held = HeldOut("rows", [], [], questions, 0, 0, 0, "0" * 64)
    assert evaluation.prompts("Q: What?\nA:", held) == ["Q: What?\nA:", *prompts]
    made = evaluation.samples("What?", "Q: What?\nA:", held, ["b0", "b1", "b2"], ["a0", "a1", "a2"])
    assert [row["question"] for row in made["held_out"]] == ["Why?", "When <b>?"]
    found: Any = {**record(home / "out"), "samples": made}
    assert not schema_errors(found)
    text, page = report.samples(found), report.page(found, b"")
    for word in ("a0", "a1", "b2", "So.", "Now."):
        assert word in text and word in page
    assert "When &lt;b&gt;?" in page and "When <b>?" not in page
    # nothing was asked, or only the sample question
    assert evaluation.samples("What?", "Q: What?\nA:", held, [], [])["held_out"] == []
    assert evaluation.samples("What?", "Q: What?\nA:", held, ["b"], ["a"]) == dict(
        question="What?", before="b", after="a", held_out=[]
    )
    assert evaluation.asked("no such beginning", "What?", "Q: What?\nA:") == "no such beginning"
