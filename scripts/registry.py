"""The little of a registry's HTTP API that a release needs, with the login that `docker login` left. For publish_image.py.

https://github.com/opencontainers/distribution-spec, version 1.1. Standard library only: `oras` of the package index attaches
nothing to an image of a registry that has no referrers API, and Debian's registry is one of those.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
MANIFESTS = f"{MANIFEST}, {INDEX}, application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json"
SECONDS = 60  # for one answer; a request here is small


class Refused(Exception):
    """The registry did not do what it was asked; one sentence."""


class Answer:
    def __init__(self, status: int, headers: Message, body: bytes):
        self.status, self.headers, self.body = status, headers, body


class Repository:
    """One repository of a registry: `host` as in an image's name, `path` without it."""

    def __init__(self, host: str, path: str):
        self.host, self.path = host, path
        local = re.match(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?$", host)  # where Docker too takes plain HTTP
        self.url = f"{'http' if local else 'https'}://{host}/v2/{path}"
        self.authorization = ""

    def problem(self) -> str | None:
        """Why nothing can be pushed here: no such host, no login, no right to write."""
        try:
            answer = self._call("POST", "/blobs/uploads/")
        except (OSError, Refused) as error:
            return str(error)
        if answer.status == 202:
            self._call("DELETE", answer.headers["Location"])  # nothing is left behind
            return None
        if answer.status in (401, 403):
            login = "its login may not write there" if _login(self.host) else "there is no login"
            return f"{self.host} lets nobody push to {self.path} as it stands: {login}. Do: docker login {self.host}"
        return f"{self.host} answers {answer.status} to a push to {self.path}: {_text(answer)}"

    def digest(self, reference: str) -> str | None:
        """Of the manifest that a tag or digest names; None where there is none."""
        answer = self._call("GET", f"/manifests/{reference}", accept=MANIFESTS)
        if answer.status == 404:
            return None
        self._expect(answer, 200, f"read {reference}")
        return _sha256(answer.body)

    def descriptor(self, reference: str) -> dict[str, Any]:
        answer = self._call("GET", f"/manifests/{reference}", accept=MANIFESTS)
        self._expect(answer, 200, f"read {reference}")
        return {"mediaType": answer.headers["Content-Type"], "digest": _sha256(answer.body), "size": len(answer.body)}

    def tag(self, digest: str, name: str) -> None:
        answer = self._call("GET", f"/manifests/{digest}", accept=MANIFESTS)
        self._expect(answer, 200, f"read {digest}")
        self._put_manifest(name, str(answer.headers["Content-Type"]), answer.body)

    def blob(self, digest: str) -> bytes:
        answer = self._call("GET", f"/blobs/{digest}")
        self._expect(answer, 200, f"read {digest}")
        return answer.body

    def attach(self, subject: Mapping[str, Any], kind: str, content: bytes, annotations: Mapping[str, str]) -> str:
        """Put `content` into the registry as what belongs to the image `subject`; the digest of its manifest."""
        config = {"mediaType": EMPTY, **self._put_blob(b"{}")}
        layer = {"mediaType": kind, **self._put_blob(content)}
        manifest = {
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": kind, "config": config, "layers": [layer],
            "subject": dict(subject), "annotations": dict(annotations),
        }  # fmt: skip
        body = json.dumps(manifest, separators=(",", ":")).encode()
        answer = self._put_manifest(_sha256(body), MANIFEST, body)
        if (
            "OCI-Subject" not in answer.headers
        ):  # a registry from before 1.1: the list is kept in a tag, as the specification says
            described = {"mediaType": MANIFEST, "digest": _sha256(body), "size": len(body)}
            self._list(subject["digest"], {**described, "artifactType": kind, "annotations": dict(annotations)})
        return _sha256(body)

    def attached(self, digest: str) -> list[dict[str, Any]]:
        """Descriptors of what belongs to the image `digest`."""
        answer = self._call("GET", f"/referrers/{digest}", accept=INDEX)
        if answer.status == 404:
            answer = self._call("GET", f"/manifests/{digest.replace(':', '-')}", accept=INDEX)
        return list(json.loads(answer.body)["manifests"]) if answer.status == 200 else []

    def _list(self, digest: str, described: dict[str, Any]) -> None:
        others = [other for other in self.attached(digest) if other["digest"] != described["digest"]]
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [*others, described]}
        self._put_manifest(digest.replace(":", "-"), INDEX, json.dumps(index, separators=(",", ":")).encode())

    def _put_manifest(self, reference: str, kind: str, body: bytes) -> Answer:
        answer = self._call("PUT", f"/manifests/{reference}", body=body, kind=kind)
        self._expect(answer, 201, f"write the manifest {reference}")
        return answer

    def _put_blob(self, content: bytes) -> dict[str, Any]:
        digest = _sha256(content)
        if self._call("HEAD", f"/blobs/{digest}").status != 200:
            begun = self._call("POST", "/blobs/uploads/")
            self._expect(begun, 202, "begin an upload")
            place = begun.headers["Location"]
            place += ("&" if "?" in place else "?") + urllib.parse.urlencode({"digest": digest})
            self._expect(
                self._call("PUT", place, body=content, kind="application/octet-stream"), 201, f"write {digest}"
            )
        return {"digest": digest, "size": len(content)}

    def _expect(self, answer: Answer, status: int, what: str) -> None:
        if answer.status != status:
            raise Refused(f"{self.host} answers {answer.status} and does not {what} in {self.path}: {_text(answer)}")

    def _call(self, method: str, place: str, *, accept: str = "", body: bytes | None = None, kind: str = "") -> Answer:
        """One request; asked for a login, it is given and the request made again."""
        url = (
            urllib.parse.urljoin(self.url, place)
            if not place.startswith("/") or place.startswith("/v2/")
            else self.url + place
        )
        headers = {"Accept": accept, "Content-Type": kind, "Authorization": self.authorization}
        answer = _request(method, url, headers, body)
        if answer.status == 401 and "WWW-Authenticate" in answer.headers:
            self.authorization = self._authorize(answer.headers["WWW-Authenticate"])
            answer = _request(method, url, {**headers, "Authorization": self.authorization}, body)
        return answer

    def _authorize(self, challenge: str) -> str:
        login = _login(self.host)
        basic = f"Basic {base64.b64encode(':'.join(login).encode()).decode()}" if login else ""
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() != "bearer":
            return basic
        words = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        asked = {"service": words.get("service", self.host), "scope": f"repository:{self.path}:pull,push"}
        answer = _request("GET", f"{words['realm']}?{urllib.parse.urlencode(asked)}", {"Authorization": basic}, None)
        if answer.status in (401, 403):
            return ""
        self._expect(answer, 200, "give a token")
        token = json.loads(answer.body)
        return f"Bearer {token.get('token') or token['access_token']}"


def _request(method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
    request = urllib.request.Request(url, data=body, method=method, headers={k: v for k, v in headers.items() if v})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:
            return Answer(reply.status, reply.headers, reply.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.headers, error.read())
    except OSError as error:
        host = urllib.parse.urlsplit(url).netloc
        raise Refused(
            f"{host} does not answer: {getattr(error, 'reason', error)}. Is it the registry's name, as in `docker login`?"
        ) from None


def _login(host: str) -> tuple[str, str] | None:
    """User and password that `docker login` keeps for `host`, in its file or with its helper."""
    folder = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        return None
    for key in (host, f"https://{host}", f"https://{host}/v1/"):
        if helper := config.get("credHelpers", {}).get(key) or config.get("credsStore"):
            asked = subprocess.run([f"docker-credential-{helper}", "get"], input=key, capture_output=True, text=True)
            if asked.returncode == 0:
                found = json.loads(asked.stdout)
                return found["Username"], found["Secret"]
        if kept := config.get("auths", {}).get(key, {}).get("auth"):
            user, _, password = base64.b64decode(kept).decode().partition(":")
            return user, password
    return None


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _text(answer: Answer) -> str:
    try:
        return "; ".join(error.get("message") or error["code"] for error in json.loads(answer.body)["errors"])
    except (ValueError, KeyError, TypeError):
        return answer.body[:200].decode(errors="replace").strip() or "(no text)"
