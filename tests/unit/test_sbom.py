"""The SBOM of a small system that has each kind of statement; tests/image asks the same of the image, with a real scanner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

import licences
import sbom

BSD = """Redistribution and use in source and binary forms, with or without modification, are permitted provided that
redistributions of source code must retain, and those in binary form must reproduce the above copyright notice."""
STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Source: glibc
Version: 2.39-0ubuntu8.6

Package: bsdutils
Status: install ok installed
Architecture: amd64
Source: util-linux (2.39.3-9ubuntu6.3)
Version: 1:2.39.3-9ubuntu6.3

Package: tini
Status: install ok installed
Architecture: amd64
Version: 0.19.0-1

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1
"""
COPYRIGHT = {
    "libc6": "Format: 1.0\n\nFiles: *\nLicense: LGPL-2.1+\n\nFiles: x\n"
    "License: GPL-2 or Expat\n\nLicense: Permission to use, copy, modify, and distribute this\n software\n",
    "bsdutils": "It is under the GPL: see /usr/share/common-licenses/GPL-2.\n",
}  # fmt: skip


def package(folder: Path, name: str, version: str, fields: str = "", licence: str = "") -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{fields}\n")
    (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{name}/__init__.py,,\n")
    if licence:
        (info / "LICENSE").write_text(licence)


@pytest.fixture
def found(tmp_path: Path) -> dict[str, dict[str, Any]]:
    root, site = tmp_path / "root", tmp_path / "site"
    for folder in ("etc", "var/lib/dpkg"):
        (root / folder).mkdir(parents=True)
    (root / "etc/os-release").write_text('ID=ubuntu\nVERSION_ID="24.04"\n')
    (root / "var/lib/dpkg/status").write_text(STATUS)
    for name, text in COPYRIGHT.items():
        (root / "usr/share/doc" / name).mkdir(parents=True)
        (root / "usr/share/doc" / name / "copyright").write_text(text)
    package(site, "expression", "1", "License-Expression: MIT AND BSD-3-Clause")
    package(site, "classified", "2", "Classifier: License :: OSI Approved :: BSD License", BSD)
    package(site, "own_terms", "3", "", "All rights reserved.")
    package(site / "setuptools/_vendor", "zipp", "4", "License: MIT License")
    (site / "setuptools/_vendor/zipp").mkdir()
    (site / "torch/_vendor/packaging").mkdir(parents=True)
    (site / "torch/_vendor/packaging/__init__.py").write_text('__version__ = "23.2"\n')
    (site / "pip/_vendor/idna").mkdir(parents=True)
    (site / "pip/_vendor/vendor.txt").write_text("# what pip brings\nidna==3.10\n")
    build = {"version": "1", "created": "2026-01-01T00:00:00Z"}
    made = sbom.bill_of_materials(sbom.installed(site, root), build)
    assert made == sbom.bill_of_materials(sbom.installed(site, root), build)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(made)) is None
    return {component["bom-ref"]: component for component in made["components"]}


def stated(component: dict[str, Any]) -> set[str]:
    return {entry.get("expression") or next(iter(entry["license"].values())) for entry in component.get("licenses", [])}


def test_debian_packages_name_their_source_and_their_system(found: dict[str, dict[str, Any]]) -> None:
    assert (found["os"]["type"], found["os"]["name"], found["os"]["version"]) == ("operating-system", "ubuntu", "24.04")
    debian = {c["name"]: c for ref, c in found.items() if ref.startswith("pkg:deb/ubuntu/")}
    assert set(debian) == {"libc6", "bsdutils", "tini"}
    qualifiers = {name: PackageURL.from_string(c["purl"]).qualifiers for name, c in debian.items()}
    assert {q["distro"] for q in qualifiers.values()} == {"ubuntu-24.04"}
    assert [qualifiers[name].get("upstream") for name in ("libc6", "bsdutils", "tini")] == [
        "glibc", "util-linux@2.39.3-9ubuntu6.3", None,
    ]  # fmt: skip
    properties = {p["name"].rpartition(":")[2]: p["value"] for p in debian["bsdutils"]["properties"]}
    assert (properties["SrcName"], properties["SrcVersion"], properties["SrcRelease"]) == (
        "util-linux",
        "2.39.3",
        "9ubuntu6.3",
    )
    assert stated(debian["libc6"]) == {"LGPL-2.1-or-later", "GPL-2.0-only", "MIT"}
    assert stated(debian["bsdutils"]) == {"GPL-2.0-only"}
    assert next(iter(stated(debian["tini"]))).startswith("see ")


def test_python_packages_and_the_copies_inside_them(found: dict[str, dict[str, Any]]) -> None:
    assert stated(found["pkg:pypi/expression@1"]) == {"MIT AND BSD-3-Clause"}
    assert stated(found["pkg:pypi/classified@2"]) == {
        "BSD-2-Clause"
    }  # the classifier does not say which; the text does
    assert stated(found["pkg:pypi/own-terms@3"]) == {"see own_terms-3.dist-info/LICENSE"}
    assert {ref for ref in found if "#" in ref} == {
        "pkg:pypi/zipp@4#setuptools/_vendor", "pkg:pypi/packaging@23.2#torch/_vendor", "pkg:pypi/idna@3.10#pip/_vendor",
    }  # fmt: skip


@pytest.mark.parametrize(("word", "known"), [
    ("GPL-2+", "GPL-2.0-or-later"), ("LGPL-2.1", "LGPL-2.1-only"), ("GPLv3+", "GPL-3.0-or-later"), ("Expat", "MIT"), ("PSF-2.0", "PSF-2.0"),
    ("BSD License", None), ("GPL", None), ("public-domain", None),
])  # fmt: skip
def test_a_word_is_known_or_stays_as_it_is(word: str, known: str | None) -> None:
    assert licences.spdx(word) == known
    assert licences.entries([word]) == [{"license": {"id": known} if known else {"name": word}}]
