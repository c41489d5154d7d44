"""`data`: what is seen of rows before they are trained; nothing heavy is imported, and no weights are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import conftest
from hub_server import HubServer

FIVE = [(f"What is number {i} of the list?", f"Number {i} is {word}.") for i, word in enumerate(("red", "blue", "green", "white", "black"))]  # fmt: skip


def rows(path: Path) -> Path:
    long = "It is a story that does not end. " * 40
    said = [*FIVE, ("发热三天应当如何处理？", "应当先查血常规。"), FIVE[1], ("Tell it.", long), ("Tell it all.", long)]
    lines = [json.dumps({"q": q, "a": a}, ensure_ascii=False) for q, a in said]
    path.write_text("\n".join(lines))
    return path


def test_rows_are_shown_and_no_weights_are_asked_for(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "template.txt").write_text("Question: {}\nAnswer: {}")
    with HubServer() as hub:
        hub.add("model", "org/tiny", llama)
        answer = conftest.call(
            "data", **hub.env(tmp_path / "home"), MODEL_NAME="org/tiny", DATASET_NAME=rows(tmp_path / "rows.jsonl"),
            PROMPT_COLUMNS="q", COMPLETION_COLUMNS="a", PROMPT_TEMPLATE=tmp_path / "template.txt", TRAIN_ON="response",
            MAX_SEQ_LENGTH=128, OUTPUT_DIR=tmp_path / "out", PYTHONPROFILEIMPORTTIME=1,
        )  # fmt: skip
        asked = [request.path for request in hub.requests]
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert any("tokenizer.json" in path for path in asked) and not [
        path for path in asked if path.endswith((".safetensors", ".bin"))
    ]
    imported = {
        line.rpartition("|")[2].strip() for line in answer.stderr.splitlines() if line.startswith("import time:")
    }
    assert "transformers" in imported and not {name for name in imported if name.split(".")[0] == "torch"}
    assert "PyTorch" not in answer.stderr
    said = answer.stdout
    assert "data: 9 rows, " in said and "2 truncated" in said
    assert "2 of 9 rows lose their ends at MAX_SEQ_LENGTH=128, first " in said and "row 8 (line 8)" in said
    whole = int(said.partition("MAX_SEQ_LENGTH=128, first")[2].partition("MAX_SEQ_LENGTH=")[2].split()[0])
    assert whole > 400
    assert f"{tmp_path}/rows.jsonl row 7 (line 7) is like {tmp_path}/rows.jsonl row 2 (line 2)" in said
    assert "Latin: 8 (88.9 %)" in said and "Han (Chinese): 1 (11.1 %)" in said and "█" in said
    assert "| Answer:‹ Number 0 is red.</s>›" in said or "| Answer:‹ Number 0 is red.<|eot|>›" in said, said
    page = (tmp_path / "out" / "data.html").read_text()
    assert "<mark> Number 0 is red." in page and "http" not in page and "<script" not in page
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data.html"]


def test_a_run_finds_the_tokens_and_may_begin_in_that_folder(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "template.txt").write_text("Question: {}\nAnswer: {}")
    given = dict(
        DATASET_NAME=rows(tmp_path / "rows.jsonl"), DATASET_CONFIG="", PROMPT_COLUMNS="q", COMPLETION_COLUMNS="a",
        PROMPT_TEMPLATE=tmp_path / "template.txt", MAX_SEQ_LENGTH=128,
    )  # fmt: skip
    seen = conftest.call("data", MODEL_NAME=llama, OUTPUT_DIR=tmp_path / "out", **given)
    assert seen.returncode == 0, seen.stderr
    record = conftest.train(llama, tmp_path / "out", MAX_STEPS=1, **given)
    assert record["dataset"]["trained"] == 9
    assert conftest.call("verify", OUTPUT_DIR=tmp_path / "out", MODEL_NAME=llama).returncode == 0
