"""What is in the image: run by docker/Dockerfile, with the image's own Python.

    sbom.py build --lock FILE --version V --revision R --source URL --created SECONDS     build.json, to stdout
    sbom.py packages --site SITE_PACKAGES                                                 what is installed, to stdout
    sbom.py bom --packages FILE --build BUILD_JSON                                        both as CycloneDX 1.6, to stdout

`packages` takes a second or two, and reads nothing of the program: a change of code does not repeat it. All print the same bytes for the same input: no clock, no random number. Standard library only.
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

import licences

VENDOR = ("_vendor", "_vendored", "vendor", "vendored")  # folders in which packages keep copies of others
IMPORTED_AS = {
    "fla": "flash-linear-attention"
}  # copies without metadata whose folder has another name than the package


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
    """What is installed, and what these packages bring inside them."""
    for package in importlib.metadata.distributions(path=[str(site)]):
        yield _python(package)
    for folder in sorted(site.glob("**/*")):
        if folder.name in VENDOR and folder.is_dir() and ".dist-info" not in str(folder):
            yield from _vendored(folder, site)


def _python(package: importlib.metadata.Distribution) -> dict[str, Any]:
    purl = _pypi(package.metadata["Name"], package.version)
    licences_of = licences.of_python(package.metadata, Path(str(package.locate_file(""))) / _metadata_folder(package))
    return _component(purl, _normal(package.metadata["Name"]), package.version, licences_of)


def _metadata_folder(package: importlib.metadata.Distribution) -> str:
    """NAME-VERSION.dist-info, as the package's own RECORD spells it."""
    return next(str(file.parent) for file in package.files or () if file.name == "METADATA")


def _vendored(folder: Path, site: Path) -> Iterator[dict[str, Any]]:
    """Copies of other packages in `folder`: by their metadata, else by folder name and `__version__`."""
    where = str(folder.relative_to(site))
    inside = _properties({"finetune:inside": where})
    known: set[str] = set()
    for package in importlib.metadata.distributions(path=[str(folder)]):
        component = _python(package)
        known |= {file.parts[0] for file in package.files or ()}
        yield {**component, "bom-ref": f"{component['bom-ref']}#{where}", "properties": inside}
    listed = folder / "vendor.txt"  # pip's
    if listed.exists():
        for name, version in re.findall(r"^\s*([\w.-]+)==([\w.]+)", listed.read_text(encoding="utf-8"), re.M):
            component = _component(_pypi(name, version), _normal(name), version, [])
            yield {**component, "bom-ref": f"{component['bom-ref']}#{where}", "properties": inside}
        return
    for copy in sorted(folder.glob("[!_.]*/")):
        if copy.name in known or copy.suffix == ".dist-info":
            continue
        start = copy / "__init__.py"
        said = re.search(
            r"^__version__ *= *[\"']([^\"']+)", start.read_text(encoding="utf-8") if start.exists() else "", re.M
        )
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(copy.glob("LICEN[CS]E*"))]
        stated = licences.entries(filter(None, map(licences.of_text, texts)))
        name, version = IMPORTED_AS.get(copy.name, copy.name), said and said[1]
        component = _component(_pypi(name, version), _normal(name), version, stated)
        yield {**component, "bom-ref": f"{component['bom-ref']}#{where}", "properties": inside}


def debian_packages(root: Path, system: dict[str, str]) -> Iterator[dict[str, Any]]:
    for paragraph in (root / "var/lib/dpkg/status").read_text(encoding="utf-8").split("\n\n"):
        fields = HeaderParser().parsestr(paragraph)
        if not (fields.get("Status") or "").endswith(" installed"):
            continue
        name, version = fields["Package"], fields["Version"]
        # `Source: glibc (2.36-9)`: without brackets the version is the same, without the field the name is too
        source, _, rest = (fields.get("Source") or name).partition(" ")
        source_version = rest.strip("()") or version
        qualifiers = {"arch": fields["Architecture"], "distro": f"{system['ID']}-{system['VERSION_ID']}"}
        if (source, source_version) != (name, version):
            qualifiers["upstream"] = source if source_version == version else f"{source}@{source_version}"
        # a purl leaves the colon of an epoch as it is
        words = "&".join(f"{key}={quote(value, safe=':')}" for key, value in sorted(qualifiers.items()))
        purl = f"pkg:deb/{system['ID']}/{quote(name)}@{quote(version, safe=':')}?{words}"
        # Advisories of Debian and Ubuntu name source packages. Grype reads `upstream`, Trivy only properties of its own
        # (aquasecurity/trivy discussion 11139).
        epoch, _, upstream = source_version.rpartition(":")
        upstream, _, release = upstream.rpartition("-") if "-" in upstream else (upstream, "", "")
        named = {
            "SrcName": source,
            "SrcVersion": upstream,
            "SrcRelease": release,
            "SrcEpoch": epoch,
            "PkgType": system["ID"],
        }
        licences_of = licences.of_debian(root / "usr/share/doc" / name / "copyright")
        properties = _properties({f"aquasecurity:trivy:{key}": value for key, value in sorted(named.items()) if value})
        yield {**_component(purl, name, version, licences_of), "properties": properties}


def operating_system(system: dict[str, str]) -> dict[str, Any]:
    """Scanners pass over every Debian package without it."""
    name, version = system["ID"], system["VERSION_ID"]
    named = {"aquasecurity:trivy:Class": "os-pkgs", "aquasecurity:trivy:Type": name}
    return {
        "type": "operating-system",
        "bom-ref": "os",
        "name": name,
        "version": version,
        "properties": _properties(named),
    }


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pypi(name: str, version: str | None) -> str:
    return f"pkg:pypi/{_normal(name)}" + (f"@{quote(version)}" if version else "")


def _properties(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _component(purl: str, name: str, version: str | None, stated: list[dict[str, Any]]) -> dict[str, Any]:
    component = {"type": "library", "bom-ref": purl, "name": name, "version": version, "licenses": stated, "purl": purl}
    return {key: value for key, value in component.items() if value}


def installed(site: Path, root: Path) -> dict[str, Any]:
    """The components of the system and of `site`, and the day of its Debian packages."""
    lines = (root / "etc/os-release").read_text(encoding="utf-8").splitlines()
    system = {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}
    packages = sorted([*python_packages(site), *debian_packages(root, system)], key=lambda c: c["bom-ref"])
    snapshot = root / "etc/apt/snapshot"
    day = snapshot.read_text(encoding="utf-8").strip() if snapshot.exists() else None
    return {"components": [operating_system(system), *packages], "apt_snapshot": day}


def bill_of_materials(packages: dict[str, Any], build: dict[str, Any]) -> dict[str, Any]:
    """CycloneDX 1.6, https://cyclonedx.org/docs/1.6/json/."""
    components = packages["components"]
    properties = {**build, "apt_snapshot": packages["apt_snapshot"]}
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
    packages.add_argument("--root", type=Path, default=Path("/"))
    bom = verbs.add_parser("bom")
    bom.add_argument("--packages", type=Path, required=True)
    bom.add_argument("--build", type=Path, required=True)
    args = parser.parse_args()
    if args.verb == "build":
        record = build_record(args.lock, args.version, args.revision, args.source, args.created)
    elif args.verb == "packages":
        record = installed(args.site, args.root)
    else:
        record = bill_of_materials(json.loads(args.packages.read_bytes()), json.loads(args.build.read_bytes()))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
