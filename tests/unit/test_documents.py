"""The documents say what the tree is: the drawing is the code's, and every file that they name is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import architecture
from conftest import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CHANGELOG.md", "Makefile", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
COMMENTED = [path for folder in ("docker", "scripts") for path in sorted((ROOT / folder).iterdir()) if path.is_file()]
FOLDERS = ("finetune", "scripts", "tests", "docker", "docs", "benchmarks")


def named(text: str) -> set[str]:
    """Files that a text names. `new` before a name: a file that is still to be written; NAME: any."""
    found = re.findall(r"(?<!new `)(?<![\w/.-])((?:[\w-]+/)*[\w-]+\.(?:py|sh|yaml))\b", " ".join(text.split()))
    return {name for name in found if "NAME" not in name}


def section(heading: str) -> list[str]:
    """The numbered lines below a heading of docs/architecture.md, the first file of each."""
    text = architecture.PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([\w/.]+)`", text, re.MULTILINE)


def test_the_drawing_is_that_of_the_code() -> None:
    page = architecture.PAGE.read_text(encoding="utf-8")
    assert f"{architecture.BEGIN}\n{architecture.drawing()}{architecture.END}" in page, "run: make env-example"


def test_the_drawing_shows_an_import_of_any_kind(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        "import finetune.console\nif TYPE_CHECKING:\n    from finetune.data import Rows\n"
        "def late():\n    from finetune import files, sources as s\n"
    )
    assert set(architecture.imported(file)) == {"console", "data", "files", "sources"}


def test_a_setting_and_a_row_go_forward() -> None:
    """Neither way is longer than it may be, and neither comes back to a file."""
    setting, row = section("One setting's way"), section("One row's way")
    assert 0 < len(setting) <= 5 and 0 < len(row) <= 10
    assert len({*setting}) == len(setting) and len({*row}) == len(row)
    readers = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "finetune").rglob("*.py")
        if re.search(r"\bsettings\.max_steps\b(?!`)", path.read_text(encoding="utf-8"))
    }
    assert readers == {"finetune/training/fit.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_names_is_there(page: Path) -> None:
    """By its path, from the top or from finetune/, or by its name alone."""
    there = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")} | {"entrypoint.py"}
    places = (ROOT, ROOT / "finetune", page.parent, *(ROOT / "finetune" / room for room in ("data", "engines")))
    for name in sorted(named(page.read_text(encoding="utf-8"))):
        found = any((place / name).exists() for place in places) if "/" in name else name in there
        assert found, f"{page.relative_to(ROOT)}: names {name}, which is not there"
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: links to {link}, which is not there"


@pytest.mark.parametrize("path", COMMENTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_of_the_program_that_a_script_names_is_there(path: Path) -> None:
    for name in re.findall(r"\bfinetune/[\w/]+\.py\b", path.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)}: names {name}, which is not there"


def test_each_fault_of_the_table_is_a_test() -> None:
    """docs/faults.md names tests as pytest does, so pytest is asked for them; the codes are those of --help."""
    from finetune.verbs.table import EXIT_CODES

    lines = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    rows = [re.split(r" *\| *", line.strip("| ")) for line in lines if "`tests/" in line]
    tests = [row[3].strip("`") for row in rows]
    files = sorted({test.partition("::")[0] for test in tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout.splitlines()
    there = {*found, *(name.partition("[")[0] for name in found)}
    assert len(rows) >= 60 and not [test for test in tests if test not in there]
    codes = {code for codes in EXIT_CODES for code in re.findall(r"\d+", codes)} | {"137"}
    assert {code for row in rows for code in row[2].split(" or ")} <= codes
