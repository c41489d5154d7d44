"""What is in the image: run by docker/Dockerfile, with the image's own Python.

    sbom.py build --lock FILE --version V --revision R --source URL --created SECONDS     build.json, to stdout
    sbom.py packages --site SITE_PACKAGES --build BUILD_JSON                              CycloneDX 1.6, to stdout

Both print the same bytes for the same input: no clock, no random number. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from email.parser import HeaderParser
from pathlib import Path
from typing import Any
from urllib.parse import quote


def build_record(lock: Path, version: str, revision: str, source: str, created: int) -> dict[str, Any]:
    """What run.json quotes of the image. `revision` ends in -dirty where the tree had changes that no commit holds."""
    return {
        "version": version,
        "revision": revision,
        "dirty": revision.endswith("-dirty"),
        "source": source or None,
        "created": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lock": lock.name,
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest(),
    }


def python_packages(site: Path) -> Iterator[dict[str, Any]]:
    for package in importlib.metadata.distributions(path=[str(site)]):
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
        purl = f"pkg:pypi/{name}@{quote(package.version)}"
        yield {
            "type": "library",
            "bom-ref": purl,
            "name": name,
            "version": package.version,
            "licenses": _licenses(package.metadata),
            "purl": purl,
        }


def _licenses(metadata: Any) -> list[dict[str, Any]]:
    if expression := metadata.get("License-Expression"):
        return [{"expression": expression}]
    classifiers = metadata.get_all("Classifier") or []
    names = sorted({c.rsplit(" :: ", 1)[1] for c in classifiers if c.startswith("License :: ") and c.count("::") > 1})
    text = (metadata.get("License") or "").strip()
    if not names and text and "\n" not in text and len(text) < 100:
        names = [text]  # else a whole licence was pasted into the field
    return [{"license": {"name": name}} for name in names]


def debian_packages(root: Path) -> Iterator[dict[str, Any]]:
    lines = (root / "etc/os-release").read_text(encoding="utf-8").splitlines()
    os_release = {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}
    distro = f"{os_release['ID']}-{os_release['VERSION_ID']}"
    for paragraph in (root / "var/lib/dpkg/status").read_text(encoding="utf-8").split("\n\n"):
        fields = HeaderParser().parsestr(paragraph)
        if not (fields.get("Status") or "").endswith(" installed"):
            continue
        name, version = fields["Package"], fields["Version"]
        # a purl leaves the colon of an epoch as it is
        where = f"arch={fields['Architecture']}&distro={distro}"
        purl = f"pkg:deb/{os_release['ID']}/{quote(name)}@{quote(version, safe=':')}?{where}"
        yield {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def bill_of_materials(site: Path, build: dict[str, Any], root: Path) -> dict[str, Any]:
    """CycloneDX 1.6, https://cyclonedx.org/docs/1.6/json/."""
    components = sorted([*python_packages(site), *debian_packages(root)], key=lambda c: c["purl"])
    snapshot = root / "etc/apt/snapshot"
    properties = {**build, "apt_snapshot": snapshot.read_text(encoding="utf-8").strip() if snapshot.exists() else None}
    digest = hashlib.sha256(json.dumps([build, components]).encode()).hexdigest()
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.UUID(digest[:32], version=4)}",
        "version": 1,
        "metadata": {
            "timestamp": build["created"],
            "component": {"type": "container", "bom-ref": "image", "name": "finetune", "version": build["version"]},
            "properties": [
                {"name": f"finetune:{key}", "value": str(value)}
                for key, value in properties.items()
                if value is not None
            ],
        },
        "components": components,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build")
    build.add_argument("--lock", type=Path, required=True)
    build.add_argument("--version", required=True)
    build.add_argument("--revision", required=True)
    build.add_argument("--source", required=True)
    build.add_argument("--created", type=int, required=True)
    packages = verbs.add_parser("packages")
    packages.add_argument("--site", type=Path, required=True)
    packages.add_argument("--build", type=Path, required=True)
    packages.add_argument("--root", type=Path, default=Path("/"))
    args = parser.parse_args()
    if args.verb == "build":
        record = build_record(args.lock, args.version, args.revision, args.source, args.created)
    else:
        record = bill_of_materials(args.site, json.loads(args.build.read_bytes()), args.root)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
