#!/usr/bin/env python3
"""The drawing in docs/architecture.md: which room imports which, read out of the code. `make env-example` writes it."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawing: make env-example -->", "<!-- end of drawing -->"


def rooms() -> list[str]:
    """The rooms from the top down, as the contract of `make lint` orders them."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in declared if contract["type"] == "layers")
    return [room.strip("()") for layer in layers for room in layer.split(" | ")]


def imported(path: Path) -> Iterator[str]:
    """The rooms that a file imports from: at its top, in functions and for types."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("finetune."))


def drawing() -> str:
    """One line a room, one column a room: ● where the line's room imports from the column's."""
    names = rooms()
    lines = [f"{'':20}{''.join(f'{number:3}' for number in range(1, len(names) + 1))}"]
    for number, name in enumerate(["entrypoint.py", *names]):
        place = ROOT / name if number == 0 else ROOT / "finetune" / name
        found = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        used = {room for path in found for room in imported(path)} - {name}
        shown = f"{number:2} {name}{'/' if place.is_dir() else '.py'}" if number else f"   {name}"
        marks = ("●" if room in used else "\\" if room == name else "·" for room in names)
        lines.append(f"{shown:20}{''.join(f'  {mark}' for mark in marks)}")
    return "\n".join(["```text", *lines, "```", ""])
