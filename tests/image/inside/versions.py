"""Installed packages against the lock (/lock), that of pip (/pip.txt) and the list of dropped ones (/prune.txt)."""

import importlib.metadata
import json
import re
from pathlib import Path

from packaging.requirements import Requirement


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


lines = [
    line.split(" \\")[0]
    for line in (Path("/lock").read_text() + Path("/pip.txt").read_text()).splitlines()
    if line[:1].isalnum()
]
pins = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()]
dropped = {plain(line.split()[1]) for line in Path("/prune.txt").read_text().splitlines() if line.startswith("drop ")}
wanted = {plain(pin.name): str(pin.specifier).removeprefix("==") for pin in pins if plain(pin.name) not in dropped}
found = {plain(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}
print(json.dumps({"wanted": wanted, "found": found}))
