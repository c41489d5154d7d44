"""Every file of every package against the RECORD of its package: missing, changed, and those that no RECORD names."""

import base64
import csv
import hashlib
import json
import sysconfig
from pathlib import Path

site = Path(sysconfig.get_paths()["purelib"])
missing, changed, named = [], [], set()
for record in site.glob("*.dist-info/RECORD"):
    for name, digest, _ in csv.reader(record.open()):
        path = (site / name).resolve()
        named.add(path)
        if not path.exists():
            missing.append(name)
        elif digest:
            kind, value = digest.split("=", 1)
            with path.open("rb") as stream:
                real = base64.urlsafe_b64encode(hashlib.file_digest(stream, kind).digest()).rstrip(b"=").decode()
            if real != value:
                changed.append(name)
present = {p.resolve() for p in site.rglob("*") if p.is_file() and p.suffix != ".pyc"}
print(
    json.dumps(
        {"missing": missing, "changed": changed, "unnamed": sorted(map(str, present - named)), "count": len(named)}
    )
)
