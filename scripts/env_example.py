#!/usr/bin/env python3
"""Write env.example, and the table between its two markers in README.md, from the declared settings."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune import files  # noqa: E402
from finetune.settings import reference, table  # noqa: E402

BEGIN, END = "<!-- settings: make env-example -->", "<!-- end of settings -->"


def main() -> None:
    """Replace both files' generated parts."""
    files.write_text(ROOT / "env.example", reference())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        sys.exit(f"README.md: needs one line {BEGIN} and one line {END}")
    generated = f"{BEGIN}\n{table()}{END}"
    files.write_text(ROOT / "README.md", re.sub(f"{BEGIN}.*{END}", lambda _: generated, readme, flags=re.DOTALL))


if __name__ == "__main__":
    main()
