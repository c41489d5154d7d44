"""Libraries that some library of the packages links and that are not there, each with one that wants it."""

import json
import subprocess
import sysconfig
from pathlib import Path

site = Path(sysconfig.get_paths()["purelib"])
libraries = [p for p in site.rglob("*.so*") if p.is_file() and p.open("rb").read(4) == b"\x7fELF"]
there = {p.name for p in libraries}
there |= {line.split()[0] for line in subprocess.check_output(["/sbin/ldconfig", "-p"], text=True).splitlines()[1:]}
lost = {}
for library in libraries:
    for line in subprocess.check_output(["readelf", "-d", str(library)], text=True).splitlines():
        if "(NEEDED)" in line and (name := line.split("[")[1].rstrip("]")) not in there:
            lost[name] = str(library.relative_to(site))
print(json.dumps(lost))
