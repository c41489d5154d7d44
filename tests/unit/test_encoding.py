"""Text is read and written as UTF-8 in every locale: a Chinese one may have GB18030, and takes a record for damaged."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT

SOURCES = sorted(path for folder in ("finetune", "scripts", "docker") for path in (ROOT / folder).rglob("*.py"))
MODULES = {"os", "tarfile", "files", "choice", "archive"}  # whose functions of these names are others


def without_encoding(source: str) -> Iterator[int]:
    """Lines on which a text file is opened, read or written in the encoding of the locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        owner, _, function = ast.unparse(node.func).rpartition(".")
        if function == "open":
            binary = any(ast.unparse(word) in ("'rb'", "'wb'", "'r+b'") for word in node.args)
        else:
            binary = function not in ("read_text", "write_text") or not owner
        if not binary and owner not in MODULES:
            yield node.lineno


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_has_its_encoding_named(source: Path) -> None:
    assert not list(without_encoding(source.read_text(encoding="utf-8")))


def test_what_is_looked_for_is_found() -> None:
    found = 'open(p)\n(a / "b").read_text()\np.write_text("abc")\nPath(p).open("w")\n'
    fine = 'open(p, "rb")\np.read_text(encoding="utf-8")\nfiles.write_text(p, t)\nos.open(p, flags)\np.read_bytes()\nwrite_text(p, t)\n'
    assert list(without_encoding(found)) == [1, 2, 3, 4] and not list(without_encoding(fine))
