#!/usr/bin/env python3
"""Write all that is generated: env.example, README's tables, run.json's schema, and the drawing in docs/architecture.md."""

from __future__ import annotations

import sys
from pathlib import Path

import architecture
import readme

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune import files  # noqa: E402
from finetune.run import record  # noqa: E402
from finetune.settings import reference, table  # noqa: E402
from finetune.verbs import table as verbs  # noqa: E402


def main() -> None:
    files.write_text(ROOT / "env.example", reference())
    readme.put("<!-- settings: make env-example -->", "<!-- end of settings -->", table())
    readme.put("<!-- verbs: make env-example -->", "<!-- end of verbs -->", verbs.readme())
    files.write_json(ROOT / "finetune" / "run.schema.json", record.schema())
    readme.put(architecture.BEGIN, architecture.END, architecture.drawing(), architecture.PAGE)


if __name__ == "__main__":
    main()
