"""What the image weighs, package by package, as a Markdown table for the README.

    python scripts/image_sizes.py [IMAGE]

Unpacked: bytes of the files. Compressed: each file by gzip -1 on its own, which adds up to what a registry transfers.
Needs Docker; $DOCKER names another client. Standard library only.
"""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import tarfile
import zlib
from pathlib import PurePosixPath

SMALL = 25e6  # bytes: what is smaller goes into one line


def group(path: str) -> str:
    """The line of the table that a file of the image belongs to."""
    parts = PurePosixPath(path).parts
    if parts[:2] == ("opt", "venv"):
        inside = parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else ()
        if not inside:
            return "Python packages, small ones"
        if inside[0] == "nvidia":
            name = parts[-1].split(".")[0] if ".so" in parts[-1] else inside[1]
            return "cuDNN" if name.startswith("libcudnn") else f"CUDA: {name}"
        return inside[0].split("-")[0].removesuffix(".libs")
    return "program" if parts[:1] == ("app",) else "system: base, Python, C compiler"


def measure(image: str, docker: str) -> dict[str, tuple[int, int]]:
    """{line: (bytes unpacked, bytes compressed)} over the files of `image`."""
    create = [docker, "create", "--pull", "never", image]
    container = subprocess.run(create, check=True, capture_output=True, text=True).stdout.strip()
    sizes: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    try:
        export = subprocess.Popen([docker, "export", container], stdout=subprocess.PIPE)
        assert export.stdout is not None
        with tarfile.open(fileobj=export.stdout, mode="r|") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is None:
                    continue
                packer = zlib.compressobj(1)
                packed = 0
                while block := content.read(1 << 20):
                    packed += len(packer.compress(block))
                line = sizes[group(member.name)]
                line[0] += member.size
                line[1] += packed + len(packer.flush())
        if export.wait():
            sys.exit(f"docker export ended with {export.returncode}")
    finally:
        subprocess.run([docker, "rm", container], check=True, stdout=subprocess.DEVNULL)
    return {name: (unpacked, packed) for name, (unpacked, packed) in sizes.items()}


def table(sizes: dict[str, tuple[int, int]]) -> str:
    """The largest first; small Python packages together; the sum last."""
    lines: dict[str, tuple[int, int]] = {}
    for name, (unpacked, packed) in sizes.items():
        small = unpacked < SMALL and name != "program"
        key = "Python packages, small ones" if small else name
        before = lines.get(key, (0, 0))
        lines[key] = (before[0] + unpacked, before[1] + packed)
    rows = sorted(lines.items(), key=lambda item: -item[1][0])
    rows.append(("**in all**", (sum(u for u, _ in sizes.values()), sum(p for _, p in sizes.values()))))
    body = [f"| {name} | {unpacked / 1e6:,.1f} | {packed / 1e6:,.1f} |" for name, (unpacked, packed) in rows]
    return "\n".join(["| part | MB unpacked | MB compressed |", "| --- | ---: | ---: |", *body])


if __name__ == "__main__":
    print(table(measure(sys.argv[1] if len(sys.argv) > 1 else "finetune:cuda13.0", os.environ.get("DOCKER", "docker"))))
