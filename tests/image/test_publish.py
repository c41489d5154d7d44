"""`make publish-image` against a real registry. Two tiny images stand in for the built ones, so that little is pushed."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sigstore_models.bundle.v1 import Bundle

import attestation
import registry_server
from conftest import ROOT
from registry import Repository

DOCKER = os.environ.get("DOCKER") or "docker"
SBOM = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}


class Release:
    """A clone of the project with one commit, images built from that commit, and a registry."""

    def __init__(self, folder: Path, host: str):
        self.folder, self.host, self.tags = folder, host, ["finetune-publish:a", "finetune-publish:b"]
        self.environ = {
            **{k: v for k, v in os.environ.items() if k not in (*attestation.OIDC, "SIGNING_KEY", "BASE")},
            "DOCKER": DOCKER, "DOCKER_CONFIG": str(folder / "login"), "HOME": str(folder), "GIT_CONFIG_GLOBAL": "/dev/null",
        }  # fmt: skip
        shutil.copytree(ROOT / "scripts", folder / "tree/scripts", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder / "tree")
        (folder / "tree/.gitignore").write_text("__pycache__\n")
        self.git("init", "-q")

    def git(self, *words: str) -> str:
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
        return self.call("git", *identity, *words, cwd=self.folder / "tree").stdout.strip()

    def call(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=cwd, env=self.environ, check=True, capture_output=True, text=True)

    def commit(self) -> str:
        """A new commit, and both images built from it."""
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "a release")
        revision = self.git("rev-parse", "HEAD")
        context = self.folder / "context"
        (context / "app").mkdir(parents=True, exist_ok=True)
        (context / "Dockerfile").write_text("FROM scratch\nCOPY app /app\n")
        build = {
            "revision": revision,
            "source": "https://example.invalid/x",
            "lock": "requirements.txt",
            "lock_sha256": "0" * 64,
        }
        (context / "app/build.json").write_text(json.dumps(build))
        labels = {
            "org.opencontainers.image.revision": revision,
            "org.opencontainers.image.base.name": f"base@sha256:{'1' * 64}",
        }
        for tag in self.tags:
            (context / "app/sbom.cdx.json").write_text(json.dumps({**SBOM, "serialNumber": tag}))
            words = [word for key, value in labels.items() for word in ("--label", f"{key}={value}")]
            self.call(DOCKER, "build", "-q", "-t", tag, *words, str(context))
        return revision

    def login(self) -> None:
        user = ("-u", registry_server.USER, "--password-stdin", self.host)
        subprocess.run(
            [DOCKER, "login", *user],
            input=registry_server.PASSWORD,
            check=True,
            capture_output=True,
            text=True,
            env=self.environ,
        )

    def publish(self, **changes: str) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, str(self.folder / "tree/scripts/publish_image.py")]
        environ = {**self.environ, "REGISTRY": f"{self.host}/team", "BUILT": " ".join(self.tags), **changes}
        return subprocess.run(script, env=environ, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with registry_server.running(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture
def release(tmp_path: Path, host: str) -> Iterator[Release]:
    made = Release(tmp_path, host)
    yield made
    subprocess.run([DOCKER, "rmi", "-f", *made.tags], capture_output=True, env=made.environ)


@pytest.fixture
def place(release: Release, monkeypatch: pytest.MonkeyPatch) -> Repository:
    monkeypatch.setenv("DOCKER_CONFIG", release.environ["DOCKER_CONFIG"])
    return Repository(release.host, "team/finetune")


def test_everything_wrong_is_shown_before_the_first_build(release: Release) -> None:
    release.commit()
    (release.folder / "tree/new.txt").write_text("no commit holds this\n")
    (release.folder / "no.pem").write_text("no key\n")
    done = release.publish(SIGNING_KEY=str(release.folder / "no.pem"), BUILT="finetune-publish:a finetune-publish:no")
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines[0] == "error: nothing was built or pushed.", done.stderr
    for text in (
        "changes that no commit holds",
        "has no image finetune-publish:no",
        "openssl ecparam",
        "docker login 127.0.0.1",
    ):
        assert sum(text in line for line in lines[1:]) == 1, done.stderr
    workflow = {
        "GITHUB_ACTIONS": "true",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "x",
        "ACTIONS_ID_TOKEN_REQUEST_URL": "http://127.0.0.1:1/?",
    }
    done = release.publish(**workflow, GITHUB_REF_TYPE="tag", GITHUB_REF_NAME="v0.0.0-other")
    assert done.returncode == 1 and "identity (OIDC), and Sigstore's client gets none" in done.stderr, done.stderr
    assert "the tag is v0.0.0-other, and pyproject.toml says" in done.stderr and "Traceback" not in done.stderr
    for registry, text in (
        ("", "REGISTRY is not set"), ("https://x.invalid/You", "allowed is host/path in lower case"), ("you", "allowed is host/path"), ("team/you", "the registry's host too"),
        ("127.0.0.1:1/you", "127.0.0.1:1 does not answer"),
    ):  # fmt: skip
        done = release.publish(REGISTRY=registry)
        assert done.returncode == 1 and text in done.stderr, done.stderr


def test_both_images_are_pushed_once_with_what_belongs_to_them(release: Release, place: Repository) -> None:
    revision = release.commit()
    release.login()
    done = release.publish()
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "not signed: SIGNING_KEY names no key" in done.stdout
        and registry_server.PASSWORD not in done.stdout + done.stderr
    )
    said = re.findall(rf"^docker pull ({release.host}/team/finetune@(sha256:[0-9a-f]{{64}}))$", done.stdout, re.M)
    tags = re.findall(r"finetune:([\w.-]+) is sha256", done.stdout)
    assert len(said) == len(tags) == 2 and done.stdout.count("docker run --gpus all") == 2
    for (name, digest), tag, image, cuda in zip(said, tags, release.tags, ("13.0", "12.8"), strict=True):
        assert re.fullmatch(rf"\d+\.\d+\.\d+-cuda{cuda}-20\d{{6}}-{revision[:12]}", tag)
        assert place.digest(tag) == digest
        # the line as it is printed
        release.call(DOCKER, "rmi", "-f", image)
        release.call(DOCKER, "pull", "-q", name)
        documents = {found["artifactType"]: document(place, found) for found in place.attached(digest)}
        assert set(documents) == {attestation.SBOM, attestation.IN_TOTO}
        assert documents[attestation.SBOM] == {**SBOM, "serialNumber": image}
        made = documents[attestation.IN_TOTO]
        assert made["subject"] == [{"name": f"{release.host}/team/finetune", "digest": {"sha256": digest[7:]}}]
        assert made["predicateType"] == "https://slsa.dev/provenance/v1"
        sources = made["predicate"]["buildDefinition"]["resolvedDependencies"]
        assert [next(iter(source["digest"].values())) for source in sources] == [revision, "0" * 64, "1" * 64]
        release.call(DOCKER, "rmi", "-f", name)
    release.commit()  # the same day, and another tag
    assert release.publish().returncode == 0
    again = release.publish()
    assert again.returncode == 1 and again.stderr.count("no tag is written twice") == 2, again.stderr


def test_a_release_that_breaks_off_leaves_no_final_tag_and_can_be_repeated(release: Release, place: Repository) -> None:
    release.commit()
    release.login()
    whole = release.tags[1]
    label = json.loads(release.call(DOCKER, "image", "inspect", "--format", "{{json .Config.Labels}}", whole).stdout)
    (release.folder / "empty").mkdir()
    (release.folder / "empty/Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")  # no SBOM in it
    words = [word for key, value in label.items() for word in ("--label", f"{key}={value}")]
    release.call(DOCKER, "build", "-q", "-t", "finetune-publish:broken", *words, str(release.folder / "empty"))
    done = release.publish(BUILT=f"{release.tags[0]} finetune-publish:broken")
    assert done.returncode == 1 and "sbom.cdx.json" in done.stderr and "Traceback" not in done.stderr, done.stderr
    tags = json.loads(place._call("GET", "/tags/list").body)["tags"]
    assert not [tag for tag in tags if tag.endswith(label["org.opencontainers.image.revision"][:12])]
    release.call(DOCKER, "rmi", "-f", "finetune-publish:broken")
    assert release.publish().returncode == 0


def test_a_key_signs_both_documents(release: Release, place: Repository) -> None:
    release.commit()
    release.login()
    key = release.folder / "key.pem"
    release.call("openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", str(key))
    release.call("openssl", "pkey", "-in", str(key), "-pubout", "-out", str(release.folder / "key.pub"))
    done = release.publish(SIGNING_KEY=str(key))
    assert done.returncode == 0 and "are signed (SIGNING_KEY)" in done.stdout, done.stdout + done.stderr
    for digest in re.findall(r"^docker pull .*@(.*)$", done.stdout, re.M):
        bundles = [
            document(place, found) for found in place.attached(digest) if found["artifactType"] == attestation.BUNDLE
        ]
        assert len(bundles) == 2
        for bundle in bundles:
            Bundle.from_json(json.dumps(bundle))  # as Sigstore's own client reads it
        for bundle in bundles:
            envelope = bundle["dsseEnvelope"]
            payload = base64.b64decode(envelope["payload"])
            assert json.loads(payload)["subject"][0]["digest"]["sha256"] == digest[7:]
            (release.folder / "signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
            for changed in (b"", b" "):
                verify = ["openssl", "dgst", "-sha256", "-verify", "key.pub", "-signature", "signature"]
                message = attestation.pae(payload + changed)
                verified = subprocess.run(verify, input=message, cwd=release.folder, capture_output=True)
                assert (verified.returncode == 0) == (not changed)


def document(place: Repository, found: dict[str, Any]) -> Any:
    """The content of what is attached."""
    manifest = json.loads(place._call("GET", f"/manifests/{found['digest']}", accept=found["mediaType"]).body)
    assert manifest["artifactType"] == found["artifactType"] == manifest["layers"][0]["mediaType"]
    return json.loads(place.blob(manifest["layers"][0]["digest"]))
