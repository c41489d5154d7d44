"""Take out of a site-packages folder what prune.txt lists, and keep each package's RECORD true to what is left.

    python prune.py SITE_PACKAGES [LIST]

Prints the megabytes that each line saved. Standard library only, but for `strip` (binutils).
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path


def read_list(path: Path, cuda: str) -> list[tuple[str, str]]:
    """(action, pattern) of each line; {cuda} filled in."""
    rules = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if code := line.split("#", 1)[0].strip():
            action, pattern = code.split(maxsplit=1)
            if action == "exclude":
                continue  # dpkg's, see Dockerfile
            if action not in ("remove", "keep", "drop", "strip"):
                sys.exit(f"{path}: unknown action {action!r}")
            rules.append((action, pattern.replace("{cuda}", cuda)))
    return rules


def files_of(path: Path) -> list[Path]:
    """The path itself where it is a file, else every file below it."""
    if path.is_dir() and not path.is_symlink():
        return sorted(p for p in path.rglob("*") if p.is_symlink() or not p.is_dir())
    return [path]


def metadata_folder(site: Path, name: str) -> Path:
    found = list(site.glob(f"{re.sub('[-_.]+', '_', name)}-*.dist-info"))
    if len(found) != 1:
        sys.exit(f"drop {name}: {len(found)} packages of that name are installed")
    return found[0]


def targets(site: Path, action: str, pattern: str) -> list[Path]:
    if action != "drop":
        return [file for path in sorted(site.glob(pattern)) for file in files_of(path)]
    record = metadata_folder(site, pattern) / "RECORD"
    return [path for row in csv.reader(record.open(encoding="utf-8")) if (path := site / row[0]).exists()]


def rewrite_records(site: Path) -> None:
    """Leave out the files that are gone and enter the new hash of those that were stripped."""
    for record in sorted(site.glob("*.dist-info/RECORD")):
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        for name, digest, size in csv.reader(record.open(encoding="utf-8")):
            path = site / name
            if not path.exists():
                continue
            if digest and str(path.stat().st_size) != size:
                sha = hashlib.sha256(path.read_bytes()).digest()
                digest = "sha256=" + base64.urlsafe_b64encode(sha).rstrip(b"=").decode()
                size = str(path.stat().st_size)
            writer.writerow([name, digest, size])
        record.write_text(out.getvalue(), encoding="utf-8")


def main(site: Path, listing: Path) -> None:
    version = re.search(r"cuda: .*= '(\d+)\.(\d+)'", (site / "torch/version.py").read_text(encoding="utf-8"))
    if version is None:
        sys.exit("torch/version.py names no CUDA version")
    rules = read_list(listing, "".join(version.groups()))
    kept = {file for action, pattern in rules if action == "keep" for file in targets(site, action, pattern)}
    unmatched, total = [], 0
    for action, pattern in rules:
        found = targets(site, action, pattern)
        if not found:
            unmatched.append(f"{action} {pattern}")
        if action == "keep":
            continue
        files = [file for file in found if file not in kept]
        saved = sum(file.lstat().st_size for file in files)
        if action == "strip":
            for file in files:
                subprocess.run(["strip", "--strip-unneeded", str(file)], check=True)
            saved -= sum(file.stat().st_size for file in files)
        else:
            for file in files:
                file.unlink()
        total += saved
        print(f"{saved / 1e6:8.1f} MB  {action} {pattern}")
    for folder in sorted((p for p in site.rglob("*") if p.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            shutil.rmtree(folder)
    rewrite_records(site)
    print(f"{total / 1e6:8.1f} MB  in all")
    if unmatched:
        sys.exit("nothing matches:\n  " + "\n  ".join(unmatched))


if __name__ == "__main__":
    here = Path(__file__).with_name("prune.txt")
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else here)
