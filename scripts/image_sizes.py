"""What the image weighs, part by part: measured into benchmarks/image-size/, and from there the table in docs/image.md.

    python scripts/image_sizes.py IMAGE…      measure, one file for each CUDA version, and write the table
    python scripts/image_sizes.py             write the table alone

Unpacked: bytes of the files. Compressed: each file by gzip -1 on its own, which adds up to what a registry transfers.
Needs Docker; $DOCKER names another client. Standard library only.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import readme

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "benchmarks/image-size"
PAGE = ROOT / "docs/image.md"
BEGIN, END = "<!-- image sizes: scripts/image_sizes.py -->", "<!-- end of image sizes -->"
SMALL = 100e6  # bytes: a part smaller than this in every image goes into the line of its kind


def group(path: str) -> str:
    """The line of the table that a file of the image belongs to."""
    parts = PurePosixPath(path).parts
    if parts[:2] == ("opt", "venv"):
        inside = parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else ()
        if not inside:
            return "commands"
        if inside[0] == "nvidia":
            name = parts[-1].split(".")[0] if ".so" in parts[-1] else inside[1]
            return "cuDNN" if name.startswith("libcudnn") else f"CUDA: {name}"
        return inside[0].split("-")[0].removesuffix(".libs")
    return "program" if parts[:1] == ("app",) else "system: base, Python, C compiler"


def measure(image: str, docker: str) -> dict[str, Any]:
    """The sizes of `image` and what it is: {"cuda": …, "parts": {part: [bytes unpacked, bytes compressed]}, …}."""
    create = [docker, "create", "--pull", "never", image]
    container = subprocess.run(create, check=True, capture_output=True, text=True).stdout.strip()
    sizes: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    kept: dict[str, bytes] = {}
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
                    if member.name.endswith(("app/build.json", "site-packages/torch/version.py")):
                        kept[PurePosixPath(member.name).name] = block
                line = sizes[group(member.name)]
                line[0] += member.size
                line[1] += packed + len(packer.flush())
        if export.wait():
            sys.exit(f"docker export ended with {export.returncode}")
    finally:
        subprocess.run([docker, "rm", "-v", container], check=True, stdout=subprocess.DEVNULL)
    cuda = re.search(rb"cuda: .*= '([\d.]+)'", kept["version.py"])
    assert cuda is not None
    ask = [
        docker,
        "image",
        "inspect",
        "--format",
        '{{index .Config.Labels "org.opencontainers.image.base.name"}}',
        image,
    ]
    engine = subprocess.run([docker, "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True)
    return {
        "cuda": cuda[1].decode(),
        "image": json.loads(kept["build.json"]),
        "base": subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip(),
        "engine": f"Docker {engine.stdout.strip()}",
        "command": f"python scripts/image_sizes.py {image}",
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "unpacked": sum(unpacked for unpacked, _ in sizes.values()),
        "compressed": sum(packed for _, packed in sizes.values()),
        "parts": dict(sorted(sizes.items())),
    }


def table(figures: list[dict[str, Any]]) -> str:
    """One line a part, the largest first, in MB; the sum last."""
    large = {part for figure in figures for part, size in figure["parts"].items() if size[0] >= SMALL}
    lines: dict[str, list[list[int]]] = {}
    for column, figure in enumerate(figures):
        for part, size in figure["parts"].items():
            kind = "smaller CUDA libraries" if part.startswith("CUDA") else "smaller Python packages, this program"
            line = lines.setdefault(part if part in large else kind, [[0, 0] for _ in figures])
            line[column] = [line[column][0] + size[0], line[column][1] + size[1]]
    rows = sorted(lines.items(), key=lambda item: -item[1][0][0])
    rows.append(("**in all**", [[figure["unpacked"], figure["compressed"]] for figure in figures]))
    head = " | ".join(f"CUDA {figure['cuda']} | compressed" for figure in figures)
    body = [
        f"| {part} | " + " | ".join(f"{n / 1e6:,.0f}" for size in sizes for n in size) + " |" for part, sizes in rows
    ]
    return "\n".join([f"| MB | {head} |", "| --- |" + " ---: | ---: |" * len(figures), *body])


def main(images: list[str]) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    for image in images:
        figure = measure(image, os.environ.get("DOCKER", "docker"))
        (FIGURES / f"cuda{figure['cuda']}.json").write_text(json.dumps(figure, indent=1) + "\n", encoding="utf-8")
    readme.put(BEGIN, END, f"{table(figures())}\n", PAGE)


def figures() -> list[dict[str, Any]]:
    """What is committed, the newest CUDA first."""
    return [json.loads(file.read_bytes()) for file in sorted(FIGURES.glob("cuda*.json"), reverse=True)]


if __name__ == "__main__":
    main(sys.argv[1:])
