"""Scripts and benchmarks run on machines that no test sees; what they take from the package has to be there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from conftest import ROOT

FILES = sorted(path for folder in ("scripts", "benchmarks", "docker") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_a_script_imports_from_the_package_is_there(path: Path) -> None:
    """Also what stands in the text of a program that it starts."""
    for module, names in re.findall(r"from (finetune[\w.]*) import ([\w ,]+)", path.read_text()):
        for name in names.split(","):
            word = name.split()[0]
            if not hasattr(importlib.import_module(module), word):
                importlib.import_module(f"{module}.{word}")
