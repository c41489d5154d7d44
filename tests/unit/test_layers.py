"""The layers of pyproject.toml hold, also where import-linter does not look: strings, and circles through `__init__`."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
# the tables of verbs, engines and hubs: what they name is imported when it is asked for
TABLES = {"finetune/verbs/table.py", "finetune/engines/choose.py", "finetune/sources/__init__.py"}
CALLS = ("import_module", "__import__", "exec", "eval")


def layer_of(module: str) -> int:
    """The number of a module's layer, from the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return next(n for n, layer in enumerate(layers) if module.split(".")[1] in layer.strip("()").split(" | "))


def test_modules_are_named_in_strings_in_three_tables_alone_and_downwards() -> None:
    for path in sorted((ROOT / "finetune").rglob("*.py")):
        here, tree = str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if here not in TABLES:
                called = getattr(node, "attr", "") == "import_module" or getattr(node, "id", "") in CALLS
                assert not called, f"{here}:{getattr(node, 'lineno', 0)}: imports by a string"
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            place = ROOT / node.value.replace(".", "/")
            if node.value.startswith("finetune.") and (place.is_dir() or place.with_suffix(".py").is_file()):
                assert here in TABLES, f"{here}:{node.lineno}: names {node.value}"
                assert layer_of(here.removesuffix(".py").replace("/", ".")) <= layer_of(node.value), f"{here} upwards"


def test_no_circle_of_files() -> None:
    """Nor one through a folder's `__init__`, which the contract takes for the folder."""
    graph = grimp.build_graph("finetune", cache_dir=None)
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            back = graph.find_shortest_chain(imported, module)
            assert back is None, f"{module} -> {' -> '.join(back)}"


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("machine/disk.py", "if TYPE_CHECKING:\n    from finetune.sources.model import Source", "finetune.machine is not allowed to import finetune.sources"),
        ("sources/publish.py", "def late() -> None:\n    from finetune.run import folder", "finetune.sources is not allowed to import finetune.run"),
        ("weights/safetensors.py", "from finetune.weights import merge", "No cycles are allowed in finetune.weights"),
    ],
)  # fmt: skip
def test_an_import_upwards_or_in_a_circle_is_refused(tmp_path: Path, file: str, line: str, said: str) -> None:
    shutil.copytree(ROOT / "finetune", tmp_path / "finetune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]  # fmt: skip
    whole = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    with (tmp_path / "finetune" / file).open("a") as stream:
        stream.write(f"\n\n{line}\n")
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1 and said in refused.stdout, refused.stdout + refused.stderr


def test_the_recipe_imports_nothing_that_unsloth_must_come_before() -> None:
    """unsloth patches trl, transformers and peft, and has to be imported before them (unsloth #2797); torch takes a second."""
    code = "import sys, finetune.run.recipe; print(sorted({'torch', 'transformers', 'peft', 'trl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
