"""Where the time to the first update goes: by phase, and for imports by package.

  python3 benchmarks/start_profile.py [OUT.json] [SETTING=value ...]

Trains as `entrypoint.py train` does, once as it is and once under `-X importtime`; needs the standard workload, and compiled
code in the cache from an earlier run, else it shows compiling.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune import files  # noqa: E402
from scripts import bench  # noqa: E402

IMPORTED = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s*(\w+)")  # microseconds of its own, package


def main(words: list[str]) -> None:
    """Run twice and write what was found."""
    out = Path(words.pop(0)) if words and "=" not in words[0] else ROOT / "outputs" / "start.json"
    work, folder = Path(os.environ.get("WORK", "/tmp/work")), out.parent / "started"
    settings = bench.workload(work, folder, 1) | dict(word.split("=", 1) for word in words)
    command = [str(ROOT / "entrypoint.py"), "train", *(f"{name}={value}" for name, value in settings.items())]
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    record = json.loads((folder / "run.json").read_bytes())
    slowed = subprocess.run(
        [sys.executable, "-X", "importtime", *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    found = dict(
        command=f"python3 benchmarks/start_profile.py OUT.json {' '.join(words)}".strip(),
        machine=bench.machine(), engine=record["engine"], timings=record["timings"],
        **imports(slowed.stderr.decode(errors="replace")),
    )  # fmt: skip
    files.write_json(out, found)
    print(json.dumps({name: found[name] for name in ("timings", "modules", "imports_s", "imports_s_by_package")}))


def imports(log: str) -> dict[str, Any]:
    """Seconds and modules of each package; what a module imports is not counted in its own time."""
    seconds: dict[str, float] = defaultdict(float)
    modules: dict[str, int] = defaultdict(int)
    for microseconds, package in IMPORTED.findall(log):
        seconds[package] += int(microseconds) / 1e6
        modules[package] += 1
    largest = sorted(seconds, key=lambda package: -seconds[package])[:25]
    return dict(
        modules=sum(modules.values()), imports_s=round(sum(seconds.values()), 2),
        imports_s_by_package={name: dict(s=round(seconds[name], 2), modules=modules[name]) for name in largest},
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
