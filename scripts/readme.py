"""The generated parts of README.md and other pages, each between two comments."""

from __future__ import annotations

import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def put(begin: str, end: str, content: str, page: Path = README) -> None:
    """Replace what stands between the lines `begin` and `end`. content: whole lines."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(f"{begin}\n")
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"{page.name}: needs a line {begin} and after it a line {end}")
    page.write_text(f"{before}{begin}\n{content}{end}{after}", encoding="utf-8")
