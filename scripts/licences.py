"""The licences of a package, as SPDX identifiers where its words are known, else in its own words. For sbom.py.

Nothing here is guessed: a text that is not recognised is named by the place where it can be read. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Words of Python classifiers, of the field License, and of Debian's copyright files (DEP-5), in lower case.
SPDX = {
    "0bsd": "0BSD",
    "3-clause bsd license": "BSD-3-Clause",
    "agpl-3": "AGPL-3.0-only",
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "apache-2.0": "Apache-2.0",
    "artistic": "Artistic-1.0-Perl",
    "artistic-2": "Artistic-2.0",
    "beerware": "Beerware",
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "bsd-4-clause": "BSD-4-Clause",
    "bzip": "bzip2-1.0.6",
    "cc0-1.0": "CC0-1.0",
    "expat": "MIT",
    "fsfullr": "FSFULLR",
    "isc": "ISC",
    "isc license (iscl)": "ISC",
    "mit": "MIT",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "mpl-2.0": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
    "x11": "X11",
    "zlib": "Zlib",
}
GNU = re.compile(r"(gpl|lgpl|gfdl)v?-?(1|2|2\.1|3|1\.2|1\.3)(?:\.0)?(\+?)$", re.IGNORECASE)
VERSIONS = {"1": "1.0", "2": "2.0", "3": "3.0"}
KNOWN = set(SPDX.values())
# Words that only this licence has: all of a line's words must be there. The first line that fits counts.
TEXTS = (
    ("Apache-2.0", ("Apache License", "Version 2.0")),
    ("MPL-2.0", ("Mozilla Public License", "2.0")),
    ("PSF-2.0", ("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2",)),
    ("BSD-3-Clause", ("Redistribution and use in source and binary forms", "endorse or promote products")),
    ("BSD-2-Clause", ("Redistribution and use in source and binary forms", "reproduce the above copyright notice")),
    ("MIT", ("Permission is hereby granted, free of charge", "The above copyright notice and this permission notice")),
    ("ISC", ("Permission to use, copy, modify, and", "this software for any purpose with or without fee is hereby granted")),
)  # fmt: skip


def spdx(word: str) -> str | None:
    """The SPDX identifier of `word` (GPL-2+, Expat, MIT License), or None."""
    if match := GNU.match(word):
        kind, version, later = match.groups()
        return f"{kind.upper()}-{VERSIONS.get(version, version)}-{'or-later' if later else 'only'}"
    return SPDX.get(word.lower()) or (word if word in KNOWN else None)


def of_text(text: str) -> str | None:
    """The licence that `text` is the whole text of."""
    words = " ".join(text.split())
    return next((name for name, marks in TEXTS if all(mark in words for mark in marks)), None)


def entries(names: Iterable[str]) -> list[dict[str, Any]]:
    """CycloneDX's list: an identifier where SPDX has one, else the name."""
    found = {("id", known) if (known := spdx(name)) else ("name", name) for name in names}
    return [{"license": {key: value}} for key, value in sorted(found)]


def of_python(metadata: Any, folder: Path) -> list[dict[str, Any]]:
    """Of a Python package: its SPDX expression, else its field or classifiers, else its licence files."""
    if expression := metadata.get("License-Expression"):
        return [{"expression": expression}]
    classifiers = metadata.get_all("Classifier") or []
    names = {c.rsplit(" :: ", 1)[1] for c in classifiers if c.startswith("License :: ") and c.count("::") > 1}
    field = (metadata.get("License") or "").strip()
    if field and "\n" not in field and len(field) < 100 and (not names or spdx(field)):
        names = {field}  # longer: a whole licence was pasted into the field
    if names and all(map(spdx, names)):
        return entries(names)
    files = sorted(p for pattern in ("LICEN[CS]E*", "COPYING*", "licenses/**/*") for p in folder.glob(pattern))
    files = [file for file in files if file.is_file()]
    read = {of_text(file.read_text(encoding="utf-8", errors="replace")) for file in files} - {None}
    if read:
        return entries(name for name in read if name)  # `BSD License` does not say which; the text does
    return entries(names or [f"see {files[0].relative_to(folder.parent)}"] if files or names else [])


def of_debian(copyright_file: Path) -> list[dict[str, Any]]:
    """Of a Debian package: every licence that its copyright file names (DEP-5), else the common licences that it points to."""
    text = copyright_file.read_text(encoding="utf-8", errors="replace") if copyright_file.exists() else ""
    names: set[str] = set()
    if re.search(r"^Format(?:-Specification)?:", text, re.MULTILINE):
        for line in re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE):
            words = re.split(r",?\s+(?:or|and|and/or)\s+|,\s*|_or_|/", line.strip())
            if all(re.fullmatch(r"\S+( with \S.* exception)?", word, re.IGNORECASE) for word in words):
                names |= {*words}  # else it is prose, where a name should stand
    if not names:
        # without the machine's form, "version 2 or later" is not told apart from "version 2"
        names = set(re.findall(r"/usr/share/common-licenses/([A-Za-z]+(?:-[\d.]*\d)?)", text))
        names |= {name} if (name := of_text(text)) else set()
    if not names:
        return [{"license": {"name": f"see {copyright_file}"}}]
    return entries(names)
