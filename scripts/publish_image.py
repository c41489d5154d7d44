"""Build both images, test them, push them, and attach SBOM and provenance: make publish-image REGISTRY=…

Tags are dated and are never written twice: VERSION-cudaCUDA-YYYYMMDD-COMMIT. Everything that is wrong is shown before the first
build, and nothing is pushed before both images have passed. A tag is written last: an image with its final name is whole. From the environment:

    REGISTRY      where to: host/path as in an image's name, logged in with `docker login`
    SIGNING_KEY   a file with a private key (PEM) that signs SBOM and provenance. Without it the identity (OIDC) of a workflow
                  signs, if there is one; else nothing is signed, and the last lines say so
    BUILT         two images that were built and tested before, "IMAGE_FOR_13.0 IMAGE_FOR_12.8": they are pushed as they are
    ARGS          for pytest: which of tests/image each image must pass; unset: all but those of this script
    and what scripts/image.sh takes, except CUDA and IMAGE
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import attestation
from registry import Refused, Repository

ROOT = Path(__file__).resolve().parent.parent
CUDAS = ("13.0", "12.8")
NAME = "finetune"


def say(text: str) -> None:
    print(f"publish-image: {text}", flush=True)


def output(*words: str) -> str:
    return subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def docker(*words: str) -> str:
    return output(os.environ.get("DOCKER") or "docker", *words)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def repository(registry: str) -> Repository | str:
    """REGISTRY as a place, or what is wrong with it."""
    example = "Example: make publish-image REGISTRY=registry.example/you"
    if not registry:
        return f"REGISTRY is not set: where shall the images go? {example}"
    if not re.fullmatch(r"[A-Za-z0-9.\-\[\]:]+(/[a-z0-9]+([._-]+[a-z0-9]+)*)+", registry):
        return f"REGISTRY={registry}: allowed is host/path in lower case, without a tag and without https://. {example}"
    host, _, path = registry.partition("/")
    if not re.search(r"[.:]|^localhost$", host):
        return f"REGISTRY={registry}: name the registry's host too, also that of Docker's own. {example}"
    return Repository(host, f"{path}/{NAME}")


class Variant:
    """The image for one CUDA version, on its way to a tag."""

    def __init__(self, cuda: str, image: str | None, tag: str):
        self.cuda, self.tag, self.staging = cuda, tag, f"staging-cuda{cuda}"
        self.built = image is not None
        self.image = image or f"{NAME}:cuda{cuda}"

    def labels(self) -> dict[str, str]:
        return dict(json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", self.image)) or {})

    def problem(self, revision: str) -> str | None:
        """Why an image that is said to be built cannot be published."""
        if not self.built:
            return None
        try:
            made_from = self.labels().get("org.opencontainers.image.revision")
        except subprocess.CalledProcessError:
            return f"BUILT: the engine has no image {self.image}"
        if made_from != revision:
            return f"BUILT: {self.image} was built from {made_from}, and here is {revision}"
        return None

    def build(self) -> None:
        if not self.built:
            environ = {**os.environ, "CUDA": self.cuda, "IMAGE": self.image}
            subprocess.run([ROOT / "scripts/image.sh"], check=True, env=environ, cwd=ROOT)

    def test(self) -> None:
        if not self.built:
            words = [
                sys.executable,
                "-m",
                "pytest",
                "tests/image",
                "--ignore=tests/image/test_publish.py",
                *os.environ.get("ARGS", "").split(),
            ]
            subprocess.run(words, check=True, env={**os.environ, "FINETUNE_IMAGE": self.image}, cwd=ROOT)

    def file(self, path: str) -> bytes:
        """A file of the image, without running it."""
        container = docker("create", "--pull", "never", self.image, "none")
        try:
            client = os.environ.get("DOCKER") or "docker"
            packed = subprocess.run([client, "cp", f"{container}:{path}", "-"], check=True, capture_output=True).stdout
        finally:
            docker("rm", "-v", container)
        with tarfile.open(fileobj=BytesIO(packed)) as tar:
            content = tar.extractfile(Path(path).name)
            assert content is not None
            return content.read()

    def push(self, place: Repository) -> str:
        """Push under a tag that every release writes anew, and give the digest that the registry has then."""
        name = f"{place.host}/{place.path}:{self.staging}"
        docker("tag", self.image, name)
        subprocess.run([os.environ.get("DOCKER") or "docker", "push", name], check=True)
        docker("rmi", name)
        return str(place.descriptor(self.staging)["digest"])

    def finish(self, place: Repository, digest: str) -> None:
        """Give the image its name: from now on it is whole."""
        if place.digest(self.tag):
            raise Refused(f"{place.path}:{self.tag} has come into being meanwhile, and no tag is written twice")
        place.tag(digest, self.tag)

    def attach(self, place: Repository, digest: str, began: str, how: str | None) -> None:
        """SBOM and provenance, readable as they are; where they are signed, the signed bundles too."""
        sbom = self.file("/app/sbom.cdx.json")
        build = json.loads(self.file("/app/build.json"))
        made = attestation.provenance(build, self.labels(), self.cuda, began, now())
        name, subject = f"{place.host}/{place.path}", place.descriptor(digest)
        said: dict[str, tuple[str, bytes, Any]] = {
            "sbom": (attestation.SBOM, sbom, json.loads(sbom)),
            "provenance": (attestation.IN_TOTO, b"", made),
        }
        for kind, (media_type, content, predicate) in said.items():
            statement = attestation.statement(name, digest, attestation.PREDICATES[kind], predicate)
            marks = {
                "org.opencontainers.image.created": began,
                "in-toto.io/predicate-type": attestation.PREDICATES[kind],
            }
            place.attach(subject, media_type, content or statement, marks)
            if how:
                marks = {
                    "dev.sigstore.bundle.content": "dsse-envelope",
                    "dev.sigstore.bundle.predicateType": attestation.PREDICATES[kind],
                }
                place.attach(subject, attestation.BUNDLE, attestation.sign(statement, how), marks)


def problems(place: Repository | str, variants: list[Variant], revision: str, version: str) -> list[str]:
    """Everything that would stop a release, found before anything is built."""
    found = []
    if os.environ.get("GITHUB_REF_TYPE") == "tag" and (name := os.environ["GITHUB_REF_NAME"]) != f"v{version}":
        found.append(f"the tag is {name}, and pyproject.toml says {version}: tag v{version}, or change the version")
    if output("git", "status", "--porcelain"):
        found.append(
            "the tree has changes that no commit holds, so nobody could build this image again: commit or stash them"
        )
    try:
        docker("version")
    except (subprocess.CalledProcessError, FileNotFoundError):
        found.append("no Docker engine answers: install and start Docker, or set DOCKER_HOST")
    else:
        found += filter(None, (variant.problem(revision) for variant in variants))
    if unsigned := attestation.signing_problem():
        found.append(unsigned)
    if isinstance(place, str):
        return [*found, place]
    if blocked := place.problem():
        return [*found, blocked]
    for variant in variants:
        if digest := place.digest(variant.tag):
            found.append(
                f"{place.host}/{place.path}:{variant.tag} exists ({digest}), and no tag is written twice. Commit, or wait for tomorrow's date"
            )
    return found


def main() -> None:
    revision = output("git", "rev-parse", "HEAD")
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert version is not None
    built = os.environ.get("BUILT", "").split()
    if built and len(built) != len(CUDAS):
        sys.exit(f"error: BUILT={' '.join(built)}: name two images, for CUDA {' and '.join(CUDAS)}")
    date = datetime.now(UTC).strftime("%Y%m%d")
    images: list[str | None] = [*built] or [None] * len(CUDAS)
    variants = [
        Variant(cuda, image, f"{version[1]}-cuda{cuda}-{date}-{revision[:12]}")
        for cuda, image in zip(CUDAS, images, strict=True)
    ]
    place = repository(os.environ.get("REGISTRY", "").rstrip("/"))
    if found := problems(place, variants, revision, version[1]):
        sys.exit("error: nothing was built or pushed.\n" + "\n".join(f"  - {one}" for one in found))
    assert isinstance(place, Repository)
    began, how = now(), attestation.signing()
    for variant in variants:
        variant.build()
        variant.test()
    digests = [variant.push(place) for variant in variants]
    for variant, digest in zip(variants, digests, strict=True):
        variant.attach(place, digest, began, how)
    for variant, digest in zip(variants, digests, strict=True):
        variant.finish(place, digest)
        name = f"{place.host}/{place.path}"
        say(f"{name}:{variant.tag} is {digest}, with {len(place.attached(digest))} documents attached")
        print(f"docker pull {name}@{digest}")
        print(f'docker run --gpus all -v "$PWD/outputs:/outputs" -v "$PWD/cache:/cache" {name}@{digest}')
    if how:
        say(f"SBOM and provenance are signed ({'SIGNING_KEY' if how == 'key' else 'by the identity of this workflow'})")
    else:
        say("not signed: SIGNING_KEY names no key, and this is no workflow with an identity (OIDC)")


if __name__ == "__main__":
    try:
        main()
    except Refused as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        words = " ".join(map(str, error.cmd))
        text = (error.stderr or "").strip()
        sys.exit(f"error: `{words}` ended with {error.returncode}" + (f": {text}" if text else ", see above"))
