"""Files of rows as people have them, written by the libraries that write them. Nothing is lost in silence, and every refusal names a way out."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import openpyxl
import pyarrow
import pytest
from pyarrow import feather, parquet

from finetune import data
from finetune.data import locate
from finetune.errors import SettingsError
from finetune.settings import Settings

ROWS = [{"question": f'{i}: "quoted", 发热\nsecond line', "answer": f"b{i}"} for i in range(5)]
COLUMNS = {"PROMPT_COLUMNS": "question", "COMPLETION_COLUMNS": "answer", "PROMPT_TEMPLATE": "two.txt", "EVAL_ROWS": "0"}
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx")


@pytest.fixture(autouse=True)
def _template(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path_factory.mktemp("template") / "two.txt"
    template.write_text("{}\n{}")
    monkeypatch.setitem(COLUMNS, "PROMPT_TEMPLATE", str(template))


def loaded(name: Any, **values: Any) -> data.Rows:
    given = {"DATASET_NAME": name, **COLUMNS, **values}
    return data.load(Settings.from_env({key: str(value) for key, value in given.items()}))


def written(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """A file of the kind that its name says, by the library that people write it with."""
    suffix, table = path.suffix, pyarrow.Table.from_pylist(rows)
    if suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8-sig")
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8-sig")
    elif suffix in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter=",\t"[suffix == ".tsv"])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        parquet.write_table(table, path)
    elif suffix == ".arrow":
        feather.write_feather(table, path, compression="uncompressed")
    elif suffix == ".xlsx":
        book = openpyxl.Workbook()
        book.create_sheet("notes").append(["one line is no row"])
        for line in [[*rows[0]], *([*row.values()] for row in rows)]:
            book.active.append(line)
        book.save(path)
    return path


def packed(path: Path, suffix: str) -> Path:
    made = path.with_name(path.name + suffix)
    if suffix == ".gz":
        made.write_bytes(gzip.compress(path.read_bytes()))
    elif suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(made), "zstd") as stream:
            stream.write(path.read_bytes())
    else:
        with zipfile.ZipFile(made, "w") as archive:
            archive.write(path, path.name)
            archive.writestr("__MACOSX/._rows", b"x")
            archive.writestr("folder/.hidden.jsonl", b"x")
    path.unlink()
    return made


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".zip"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str, suffix: str) -> None:
    path = written(tmp_path / f"rows{kind}")
    found = loaded(packed(path, suffix) if suffix else path)
    assert [*found.rows] == ROWS and found.format == "columns"
    assert found.sha256 == "378ec313406a236da7ca4c1dc7cc09611e032cd0380647d0eadd657bf211c990"


def test_cells_of_a_sheet_are_what_csv_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers, dates, truth and empty cells are text; a line without a value is no row; a place is a sheet and a line."""
    lines = [
        [3, 2.5], [2.0, True], [datetime.date(2026, 1, 31), datetime.datetime(2026, 1, 31, 9, 5)], [None, None],
        ["a", "b", "c"], ["=1+1", "no value"], ["", "x"], [None, "y"], ["é\u3000", "发热\nsecond"],
    ]  # fmt: skip
    book = openpyxl.Workbook()
    book.active.title = "Fragen"
    for line in [["question", "answer"], *lines]:
        book.active.append(line)
    book.save(tmp_path / "rows.xlsx")
    with pytest.raises(SettingsError) as refused:
        loaded(tmp_path / "rows.xlsx")
    told = str(refused.value)
    assert "rows.xlsx sheet Fragen row 4 (line 6): has more cells" in told
    assert "row 5 (line 7): has a formula without its value in question" in told
    assert "row 6 (line 8): " in told and "row 7 (line 9): " in told
    found = loaded(tmp_path / "rows.xlsx", DROP_BAD_ROWS=1)
    assert "rows.xlsx: the rows are those of the sheet Fragen" in capsys.readouterr().out
    assert [*found.places][-1].endswith("rows.xlsx sheet Fragen row 8 (line 10)")
    (tmp_path / "rows.csv").write_text(
        'question,answer\n3,2.5\n2,TRUE\n2026-01-31,2026-01-31 09:05:00\n,x\n,y\né\u3000,"发热\nsecond"\n',
        encoding="utf-8",
    )
    assert found.sha256 == loaded(tmp_path / "rows.csv", DROP_BAD_ROWS=1).sha256
    book.copy_worksheet(book.active).title = "more"
    book.save(tmp_path / "two.xlsx")
    with pytest.raises(SettingsError, match=r"2 sheets have rows \(Fragen, more\).*save the one as CSV"):
        loaded(tmp_path / "two.xlsx")
    (tmp_path / "not.xlsx").write_bytes((tmp_path / "two.xlsx").read_bytes()[:900])
    with pytest.raises(SettingsError, match=r"not\.xlsx: not a whole \.xlsx file"):
        loaded(tmp_path / "not.xlsx")


def test_many_rows_in_a_list_of_json_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"question": "q" * (i % 700), "answer": f"[{i}, \\u0041]" + "\n" * 3, "n": [i, {"a": -1.5e3}]}
        for i in range(1, 300)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    whole = [*loaded(path).rows]
    for piece in (1, 7, 64, 1000):
        monkeypatch.setattr("finetune.data.reading.PIECE", piece)
        assert [*loaded(path).rows] == whole


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[{"question": "a", "answer": "b"},\n {"question" "a"}]', r"Expecting ':' delimiter\) in row 2, line 2"),
        ('[{"question": "a"}\n {"question": "a"}]', "comma between two values"), ('[{"question": "a"}', "does not end"),
        ('[{"question": "a', "Unterminated string"), ("[1]\n[2]", "something follows the list"), ("[{},]", "Expecting value"),
        ('[{"question": "a", "question": "b"}]', "has question more than once"),
    ],
)  # fmt: skip
def test_a_list_of_json_that_is_damaged(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(SettingsError, match=rf"rows\.json: .*{why}"):
        loaded(tmp_path / "rows.json")


def test_an_object_with_one_list_is_told_and_a_conversation_is_no_list_of_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    assert [*loaded(tmp_path / "rows.json").rows] == ROWS
    assert "the rows are the list data; version is not read" in capsys.readouterr().out
    for chat in (
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"conversations": [{"from": "human", "value": "Hi"}]},
    ):
        (tmp_path / "rows.json").write_text(json.dumps(chat))
        with pytest.raises(
            SettingsError, match=r"is one conversation and no list of rows; put it in a list, such as \[\{"
        ):
            loaded(tmp_path / "rows.json")


def test_plain_text_is_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_bytes("\ufeffThe sky.\r\n\r\n  is blue\n".encode())
    read = [*data.reading.rows(data.opened.File("rows.txt", tmp_path / "rows.txt"), set())]
    assert read == [(1, 1, {"text": "The sky."}), (2, 3, {"text": "  is blue"})]


@pytest.mark.parametrize(
    ("encoding", "told", "text"),
    [
        ("gb18030", "GB18030", "发热三天,应当如何处理?"), ("gb18030", "GB18030", "发,热"), ("big5", "Big5", "發燒三天應該怎麼辦呢"), ("shift_jis", "Shift_JIS", "これは何ですか"),
        ("euc_kr", "EUC-KR", "이것은 무엇입니까"), ("cp1252", "Windows-1252", "déjà vu, Größe"), ("cp1251", "Windows-1251", "что это такое"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".json"])
def test_another_encoding_is_named_with_the_place_and_the_remedy(
    tmp_path: Path, kind: str, encoding: str, told: str, text: str
) -> None:
    rows = [{"question": "plain" * 4, "answer": "a"}] * 1000 + [{"question": text, "answer": text}]
    path = written(tmp_path / f"rows{kind}", rows)
    path.write_text(path.read_text(encoding="utf-8-sig").encode().decode("unicode_escape" if kind == ".json" else "utf-8"), encoding=encoding)  # fmt: skip
    content = path.read_bytes()
    first = next(at for at, byte in enumerate(content) if byte > 127)
    assert first > 8192
    with pytest.raises(SettingsError, match=rf"not UTF-8 at byte {first + 1} .*{told}; .*iconv -f {told} -t UTF-8 rows\{kind} > utf8\{kind}"):  # fmt: skip
        loaded(path)


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".json", ".txt"])
def test_utf16_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"rows{kind}").write_text("question,answer\na,b\n", encoding="utf-16")
    with pytest.raises(SettingsError, match=r"is UTF-16 and not UTF-8; .*iconv -f UTF-16"):
        loaded(tmp_path / f"rows{kind}")


def test_rows_that_cannot_be_read_are_named_or_dropped(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0]).encode()
    (tmp_path / "rows.jsonl").write_bytes(
        b"\n".join([good, b"{", b'{"question": "\xff", "answer": "a"}', b"[" * 100_000, good])
    )
    with pytest.raises(SettingsError) as raised:
        loaded(tmp_path / "rows.jsonl")
    told = "\n".join(raised.value.problems)
    assert "row 2 (line 2): is not JSON" in told and "row 3 (line 3): is not UTF-8 at byte" in told
    assert "row 4 (line 4): is nested too deeply" in told and "3 of 5 rows are malformed" in told
    kept = loaded(tmp_path / "rows.jsonl", DROP_BAD_ROWS=1)
    assert (kept.seen, kept.dropped, len(kept.rows)) == (5, 3, 2)
    (tmp_path / "rows.tsv").write_text("question\tanswer\na\tb\tc\na\tb\n")
    with pytest.raises(SettingsError, match=r"row 1 \(line 2\): has more fields than the header; put fields with tabs"):
        loaded(tmp_path / "rows.tsv")
    assert loaded(tmp_path / "rows.tsv", DROP_BAD_ROWS=1).dropped == 1


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".zip"])
def test_a_damaged_archive_is_no_bug(tmp_path: Path, suffix: str) -> None:
    path = packed(written(tmp_path / "rows.jsonl"), suffix)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(SettingsError, match=r"rows\.jsonl\.\w+: cannot be (unpacked|read) \("):
        loaded(path)


def test_a_zip_has_files_of_one_kind(tmp_path: Path) -> None:
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b.jsonl", json.dumps(ROWS[1]))
        archive.writestr("a.jsonl", json.dumps(ROWS[0]))
        archive.writestr("LICENSE.txt", "free")
    found = loaded(path)
    assert [*found.rows] == ROWS[:2] and found.places[1] == f"{path}/b.jsonl row 1 (line 1)"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("c.csv", "question,answer\n")
    with pytest.raises(SettingsError, match=r"holds files of \.csv, \.jsonl, and it takes files of one kind"):
        loaded(path)


@pytest.mark.parametrize("name", ["rows.xls", "rows.7z", "rows.tar.gz", "rows.foo"])
def test_a_file_of_another_kind_is_never_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:  # fmt: skip
    (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    remedy = {"rows.xls": "Save the sheet as CSV", "rows.foo": r"rows\.jsonl"}.get(name, "Unpack it")
    with pytest.raises(
        SettingsError, match=rf"DATASET_NAME={name}: not a known kind of file; it takes \.jsonl, .*{remedy}"
    ):
        loaded(name)


# Folders, globs, several names


def test_shards_globs_and_names_with_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name, row in (("b.jsonl", 1), ("a.jsonl", 0), ("c,d.jsonl", 2)):
        written(tmp_path / name, [ROWS[row]])
    monkeypatch.chdir(tmp_path)
    assert [*loaded("b.jsonl, a.jsonl").rows] == [ROWS[1], ROWS[0]]  # as given
    assert [*loaded("?.jsonl").rows] == ROWS[:2]  # sorted
    assert "data: ?.jsonl: a.jsonl, b.jsonl\n" in capsys.readouterr().out
    assert [*loaded("c,d.jsonl").rows] == [ROWS[2]]
    with pytest.raises(SettingsError) as raised:
        loaded("x.jsonl,y.csv,*.parquet")
    assert [problem.split(":")[0] for problem in raised.value.problems] == [
        "DATASET_NAME=x.jsonl", "DATASET_NAME=y.csv", "DATASET_NAME=*.parquet",
    ]  # fmt: skip
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / ".hidden.jsonl").touch()
    assert [*loaded(".").rows] == ROWS[:3]
    assert "; left out: .hidden.jsonl (hidden); left out: empty.jsonl (empty)\n" in capsys.readouterr().out


def test_splits_of_a_folder(tmp_path: Path) -> None:
    for name, row in (("train-0.parquet", 0), ("train-1.parquet", 1), ("test.parquet", 2), ("notes.txt", 0)):
        written(tmp_path / name, [ROWS[row]])
    (tmp_path / "notes.txt").write_text("These are notes.")
    assert [*loaded(tmp_path).rows] == ROWS[:2]
    assert [*loaded(tmp_path, DATASET_SPLIT="test[:1]").rows] == [ROWS[2]]
    with pytest.raises(
        SettingsError, match=r"DATASET_SPLIT=dev: .* has only the splits test, train, for example DATASET_SPLIT=test"
    ):
        loaded(tmp_path, DATASET_SPLIT="dev")


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=saved.select([0]), test=saved.select([1])).save_to_disk(tmp_path / "two")
    assert [*loaded(tmp_path / "one").rows] == ROWS
    assert [*loaded(tmp_path / "two").rows] == [ROWS[0]]
    assert [*loaded(tmp_path / "two", DATASET_SPLIT="test").rows] == [ROWS[1]]
    with pytest.raises(SettingsError, match=r"DATASET_SPLIT=dev: .* has train, test, for example DATASET_SPLIT=train"):
        loaded(tmp_path / "two", DATASET_SPLIT="dev")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(SettingsError, match="looks like a folder of save_to_disk, but is not whole"):
        loaded(tmp_path / "one")


CARD = """---
license: mit
configs:
- config_name: en
  data_files: "english/*.jsonl"
- config_name: zh
  default: true
  data_files:
  - split: train
    path: ["zh/b.jsonl", "zh/a.jsonl"]
  - split: test
    path: zh/c.jsonl
---
# Rows
"""


def test_a_folder_with_a_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    for name, row in (("english/x.jsonl", 0), ("zh/a.jsonl", 1), ("zh/b.jsonl", 2), ("zh/c.jsonl", 3)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written(tmp_path / name, [ROWS[row]])
    assert [*loaded(tmp_path).rows] == [ROWS[2], ROWS[1]]
    assert [*loaded(tmp_path, DATASET_SPLIT="test").rows] == [ROWS[3]]
    assert [*loaded(tmp_path, DATASET_CONFIG="en").rows] == [ROWS[0]]
    with pytest.raises(SettingsError, match=r"DATASET_CONFIG=fr: .* has en, zh, for example DATASET_CONFIG=en"):
        loaded(tmp_path, DATASET_CONFIG="fr")
    with pytest.raises(SettingsError, match=r"DATASET_SPLIT=dev: .* has train, test"):
        loaded(tmp_path, DATASET_SPLIT="dev")
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    with pytest.raises(SettingsError, match=r"the head of its README\.md is not YAML"):
        loaded(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "a,b.csv", "x/*.json", "rows.xlsx", "rows.xls", "./rows", "samples"])
def test_names_that_are_no_names_on_the_hub(name: str) -> None:
    assert not locate.on_hub(name)
    assert locate.on_hub("owner/name")
