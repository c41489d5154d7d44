"""A local stand-in for the Hub: enough of its HTTP API for the real huggingface_hub client.

    with HubServer() as hub:
        hub.add("model", "tester/tiny", folder)
        subprocess.run([...], env={**os.environ, **hub.env(home, "hf_write")})
        assert hub.files("model", "tester/out")["config.json"]

By hand: python tests/hub_server.py --seed model:org/name:FOLDER --port 8000

Read from huggingface_hub 1.33.0. What it does not speak it answers with 501, which the client does not retry.
"""

import argparse
import base64
import hashlib
import json
import math
import re
import signal
import socket
import struct
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote

Json = dict[str, Any]

LFS_SIZE = 10 << 20  # the Hub takes no larger file into git itself
LFS_SUFFIXES = (".arrow", ".bin", ".gguf", ".gz", ".npz", ".parquet", ".pt", ".pth", ".safetensors", ".zip")


class HubError(Exception):
    """An answer that is an error. The client picks its exception by the code, not by the status."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        # a header is latin-1: a path in other letters must not break the answer
        self.headers = {"X-Error-Message": message.encode("ascii", "replace").decode(), **headers}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class Token:
    """A row of the token table. Only a fineGrained token has scopes: user, org or org/name -> permissions."""

    user: str
    role: Literal["read", "write", "fineGrained"]
    orgs: Mapping[str, str] = field(default_factory=dict)  # organisation -> the user's role in it
    scopes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reads_gated: bool = True  # fineGrained: "read access to public gated repos" is ticked

    def may(self, action: Literal["read", "write"], repo_id: str) -> bool:
        namespace = repo_id.partition("/")[0]
        if self.role == "fineGrained":
            granted = {*self.scopes.get(namespace, ()), *self.scopes.get(repo_id, ())}
            return "repo.write" in granted or (action == "read" and "repo.content.read" in granted)
        member = "admin" if namespace == self.user else self.orgs.get(namespace)
        return member is not None if action == "read" else self.role == "write" and member in ("admin", "write")

    def whoami(self) -> Json:
        access: Json = {"displayName": self.role, "role": self.role, "createdAt": "2025-01-01T00:00:00.000Z"}
        if self.role == "fineGrained":
            kinds = {name: "model" if "/" in name else "user" if name == self.user else "org" for name in self.scopes}
            entities = {name: {"_id": sha1(name)[:24], "type": kinds[name], "name": name} for name in self.scopes}
            scoped = [{"entity": entities[name], "permissions": list(names)} for name, names in self.scopes.items()]
            access["fineGrained"] = {"canReadGatedRepos": self.reads_gated, "global": [], "scoped": scoped}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in self.orgs.items()]
        auth = {"type": "access_token", "accessToken": access}
        return {"type": "user", "id": sha1(self.user)[:24], "name": self.user, "orgs": orgs, "auth": auth}


TOKENS = {
    "hf_write": Token("tester", "write", orgs={"team": "write"}),
    "hf_read": Token("tester", "read", orgs={"team": "write"}),
    "hf_fine": Token("tester", "fineGrained", scopes={"tester": ("repo.content.read", "repo.write")}),
    "hf_stranger": Token("stranger", "write"),
}


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @cached_property
    def oid(self) -> str:
        """Git's own hash. In LFS that is the pointer's, which no client reads, so the content's does as well."""
        return sha1(b"blob %d\0" % len(self.data) + self.data)

    @cached_property
    def etag(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.lfs else self.oid

    def pointer(self, hash_name: str) -> Json:
        return {"lfs": {hash_name: self.etag, "size": len(self.data), "pointerSize": 134}} if self.lfs else {}


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    gated: Literal["auto", "manual", False] = False
    granted: set[str] = field(default_factory=set)  # users who were let into a gated repository
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)  # by sha, oldest first

    @property
    def path(self) -> str:
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"

    def at(self, revision: str) -> Commit:
        if commit := self.branches.get(revision) or self.commits.get(revision):
            return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, branch: str, files: Mapping[str, Blob], title: str) -> Commit:
        tree = sorted((path, blob.etag) for path, blob in files.items())
        # no date in it: the same history has the same sha in every run
        sha = sha1(repr((self.path, list(self.commits), branch, title, tree)))
        self.branches[branch] = self.commits[sha] = Commit(sha, title, dict(files))
        return self.commits[sha]


@dataclass
class Request:
    method: str
    path: str  # as sent, without the query
    authorized: bool  # it carried a token of the table
    status: int = 0  # 0: the connection was closed before an answer


@dataclass
class Fault:
    """What goes wrong with a request. cut: the connection is closed, by `reset` with an RST; stall: seconds before the answer.

    after: bytes of the body that are sent. announced: bytes that the header promises. body: sent in place of the right one.
    """

    pattern: str = ""
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    reset: bool = False
    after: int | None = None
    announced: int | None = None
    stall: float = 0
    flip: float | None = None
    body: bytes | None = None


HTML = b"<!doctype html><html><body>Please log in to the hotel's network</body></html>"
PORTAL: Mapping[str, Any] = {"body": HTML, "headers": {"Content-Type": "text/html; charset=utf-8"}}


class HubServer:
    """Serves inside `with`. Everything is in memory.

    Patterns are regular expressions, searched in "METHOD /path".
    """

    def __init__(
        self, tokens: Mapping[str, Token] = TOKENS, host: str = "127.0.0.1", port: int = 0, *, quiet: bool = False
    ) -> None:
        self.quiet = quiet  # nothing on stderr, not even where a client is gone
        self.tokens = dict(tokens)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.uploads: dict[str, bytes] = {}  # LFS content by sha256
        self.faults: list[Fault] = []  # each for one request
        self.lock = threading.Lock()
        self.over = threading.Event()  # ends every stall
        self._server = _Server((host, port), type("Handler", (_Handler,), {"hub": self}))
        self._server.quiet = quiet
        self._server.socket.listen(128)  # 5 is its default; a client with eight threads would wait a second to get in
        self.url = f"http://{host}:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()

    def env(self, home: Path | str, token: str = "") -> dict[str, str]:
        """Variables that lead a client here, its caches under `home`; an empty token is none."""
        place = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token, "NO_PROXY": "*", "no_proxy": "*"}
        # with Xet the client would upload by a protocol that only the Hub speaks
        return {**place, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}

    def add(
        self, kind: str, repo_id: str, source: Path | str | Mapping[str, bytes], branch: str = "main", **flags: Any
    ) -> str:
        """Commit `source` as the whole tree of a branch and return the sha. For a new Repo: private, gated, granted."""
        if kind not in ("model", "dataset", "space") or repo_id.count("/") != 1:
            raise ValueError(f"{kind} {repo_id}: must be like 'model' 'org/name'")
        if not isinstance(source, Mapping):
            if not Path(source).is_dir():
                raise NotADirectoryError(source)
            found = {file.relative_to(source): file for file in sorted(Path(source).rglob("*")) if file.is_file()}
            hidden = (".git", ".cache")
            source = {path.as_posix(): file.read_bytes() for path, file in found.items() if path.parts[0] not in hidden}
        files = {path: Blob(data, is_lfs(path, len(data))) for path, data in source.items()}
        repo = self.repos.setdefault((kind, repo_id), Repo(kind, repo_id, **flags))
        return repo.commit(branch, files, "Add files").sha

    def files(self, kind: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.repos[kind, repo_id].at(revision).files.items()}

    def seen(self, pattern: str) -> list[Request]:
        return [entry for entry in self.requests if re.search(pattern, f"{entry.method} {entry.path}")]

    def fail_next(self, pattern: str, status: int = 503, times: int = 1) -> None:
        """Answer the next requests that match with an error."""
        self.faults += [Fault(pattern, status)] * times

    def cut_next(self, pattern: str, after: int | None = None, times: int = 1) -> None:
        """Close the connection after so many bytes of the body, or (None) before any answer."""
        self.faults += [Fault(pattern, cut=True, after=after)] * times

    def flip_next(self, pattern: str, at: float = 0.5, times: int = 1) -> None:
        """Answer the next requests that match with one bit of the body flipped, under the right hash. at: 0 first byte, 1 last."""
        self.faults += [Fault(pattern, flip=at)] * times

    def fault(self, pattern: str, times: int = 1, **what: Any) -> None:
        """Let this go wrong with the next requests that match. what: fields of `Fault`."""
        self.faults += [Fault(pattern, **what)] * times

    def take_fault(self, request: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if re.search(fault.pattern, request):
                    self.faults.remove(fault)
                    return fault
        return Fault()


Handle = Callable[..., Any]
ROUTES: list[tuple[str, re.Pattern[str], bool, Handle]] = []
WEB = "/(?:(?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+?)"
API = "/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
REV = "(?P<revision>[^/]+)"


def route(method: str, path: str, *, write: bool = False) -> Callable[[Handle], Handle]:
    """Groups of the path become arguments, decoded; kind and repo_id become `repo`, once access to it is checked.

    What the method returns is sent as JSON; None means that it has answered itself.
    """

    def register(handle: Handle) -> Handle:
        ROUTES.append((method, re.compile(path), write, handle))
        return handle

    return register


class _Server(ThreadingHTTPServer):
    quiet = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not self.quiet and not isinstance(sys.exception(), ConnectionError):  # a client hangs up after a fault
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body leave together; apart, the second waits 40 ms for an acknowledgement
    hub: HubServer

    def log_message(self, format: str, *values: Any) -> None:
        if not self.hub.quiet:
            super().log_message(format, *values)

    def serve(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        self.base = f"http://{self.headers['Host']}"  # the name by which the client knows the server
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.token = self.hub.tokens.get(bearer)
        self.entry = Request(self.command, path, self.token is not None)
        self.hub.requests.append(self.entry)
        self.fault = self.hub.take_fault(f"{self.command} {path}")
        self.close_connection |= self.fault.cut or self.fault.reset or self.fault.announced is not None
        if self.fault.reset:  # closed with nothing lingering, TCP says RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if (self.fault.cut or self.fault.reset) and self.fault.after is None:
            return None
        self.body = self.read_body()  # always: left unread, it would be taken for the next request
        if self.fault.stall:
            self.hub.over.wait(self.fault.stall)
        try:
            if self.fault.status:
                raise HubError(self.fault.status, "Injected fault", **self.fault.headers)
            if self.fault.body is not None and self.command != "HEAD":
                return self.send(200, self.fault.body, {"Content-Type": "application/json"})
            if bearer and not self.token:
                raise HubError(401, "Invalid credentials in Authorization header")
            if (answer := self.dispatch(path)) is not None:
                self.send_json(answer)
        except HubError as error:
            self.send_json({"error": str(error)}, error.status, error.headers)
        except Exception:
            traceback.print_exc()
            self.send_json({"error": traceback.format_exc()}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def dispatch(self, path: str) -> Any:
        method = "GET" if self.command == "HEAD" else self.command
        for routed, pattern, write, handle in ROUTES:
            if routed == method and (match := pattern.fullmatch(path)):
                found: Json = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                if "repo_id" in found:
                    kind = found.pop("kind", "models").removesuffix("s")
                    found["repo"] = self.find(kind, found.pop("repo_id"), write)
                return handle(self, **found)
        raise HubError(501, f"hub_server.py does not speak {self.command} {path}")

    def find(self, kind: str, repo_id: str, write: bool) -> Repo:
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and not (self.token and self.token.may("read", repo_id))):
            # to others a private repository is none; over plain http the client goes by the code alone
            raise HubError(404 if self.token else 401, "Repository not found", "RepoNotFound")
        if write:
            self.need_write(repo_id)
        return repo

    def need_write(self, repo_id: str) -> None:
        if not self.token:
            raise HubError(401, "Invalid username or password.")
        if not self.token.may("write", repo_id):
            raise HubError(403, f"You don't have the rights to write to {repo_id}")

    def need_grant(self, repo: Repo) -> None:
        if not repo.gated or (self.token and self.token.may("write", repo.id)):
            return
        if self.token and self.token.role == "fineGrained" and not self.token.reads_gated:
            raise HubError(403, "Please enable access to public gated repositories in your fine-grained token settings")
        if not self.token or self.token.user not in repo.granted:
            raise HubError(403 if self.token else 401, f"Access to {repo.kind} {repo.id} is restricted", "GatedRepo")

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send_json(self, payload: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send(status, json.dumps(payload).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.entry.status = status
        self.send_response(status)
        length = len(body) if self.fault.announced is None else self.fault.announced
        for name, value in {**headers, **self.fault.headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.fault.flip is not None:
                flipped = bytearray(body)
                flipped[int(self.fault.flip * (len(body) - 1))] ^= 1
                body = bytes(flipped)
            self.wfile.write(body[: self.fault.after])

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Json:
        if not self.token:
            raise HubError(401, "Invalid username or password.")
        return self.token.whoami()

    @route("GET", f"{API}(?:/revision/{REV})?")
    def repo_info(self, repo: Repo, revision: str = "main") -> Json:
        commit = repo.at(revision)
        info: Json = {"id": repo.id, "author": repo.id.partition("/")[0], "sha": commit.sha, "tags": []}
        info |= {"private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0}
        info["siblings"] = [{"rfilename": path} for path in commit.files]
        if "blobs" in self.query:
            for sibling, blob in zip(info["siblings"], commit.files.values(), strict=True):
                sibling |= {"size": len(blob.data), "blobId": blob.oid, **blob.pointer("sha256")}
        if repo.kind == "model" and (counts := count_parameters(commit)):
            info["safetensors"] = {"parameters": counts, "total": counts.total()}
        if expand := self.query.get("expand"):
            info = {key: value for key, value in info.items() if key in ("id", *expand)}
        if "securityStatus" in self.query:
            info["securityRepoStatus"] = {"scansDone": True, "filesWithIssues": []}
        return info

    @route("GET", f"{API}/tree/{REV}(?:/(?P<path>.+))?")
    def tree(self, repo: Repo, revision: str, path: str = "") -> list[Json]:
        above = f"{path}/" if path else ""
        below = {name: entry for name, entry in entries(repo.at(revision)).items() if name.startswith(above)}
        if path and not below:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive") == ["true"]
        return [entry for name, entry in below.items() if recursive or "/" not in name.removeprefix(above)]

    @route("POST", f"{API}/paths-info/{REV}")
    def paths_info(self, repo: Repo, revision: str) -> list[Json]:
        listing = entries(repo.at(revision))
        return [listing[path] for path in parse_qs(self.body.decode()).get("paths", []) if path in listing]

    @route("GET", f"{API}/refs")
    def refs(self, repo: Repo) -> Json:
        heads = {name: {"ref": f"refs/heads/{name}", "targetCommit": at.sha} for name, at in repo.branches.items()}
        return {"branches": [{"name": name, **head} for name, head in heads.items()], "tags": [], "converts": []}

    @route("GET", f"{WEB}/resolve/{REV}/(?P<path>.+)")
    def resolve(self, repo: Repo, revision: str, path: str) -> None:
        self.need_grant(repo)
        commit = repo.at(revision)
        if (blob := commit.files.get(path)) is None:
            # with the commit the client can remember that the file is not there
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        size = len(blob.data)
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(size)}
        start, end = 0, size
        if ranged := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = ranged.groups()
            start, end = (int(first), min(int(last or size) + 1, size)) if first else (max(size - int(last), 0), size)
            if start >= end:
                raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self.send(206 if ranged else 200, blob.data[start:end], headers)

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        wanted = json.loads(self.body)
        kind, namespace = wanted.get("type", "model"), wanted.get("organization") or (self.token and self.token.user)
        new = Repo(kind, f"{namespace}/{wanted['name']}", private=wanted.get("visibility") == "private")
        self.need_write(new.id)
        answer = {"url": f"{self.base}/{new.path}", "name": new.id}
        with self.hub.lock:
            if self.hub.repos.setdefault((kind, new.id), new) is new:
                attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
                new.commit("main", {".gitattributes": Blob(attributes.encode(), lfs=False)}, "initial commit")
                return self.send_json(answer)
        # with exist_ok the client reads the address from the refusal
        self.send_json({**answer, "error": f"You already created this {kind} repo"}, 409)

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Json:
        return {"errors": [], "warnings": []}  # the client asks before each push of a README.md

    @route("POST", f"{API}/preupload/{REV}", write=True)
    def preupload(self, repo: Repo, revision: str) -> Json:
        commit, answers = repo.at(revision), []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            present = commit.files.get(file["path"])
            # by the oid the client leaves out a file that has not changed
            oid = {"oid": present.etag} if present else {}
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return {"files": answers}

    @route("POST", rf"{WEB}\.git/info/lfs/objects/batch", write=True)
    def lfs_batch(self, repo: Repo) -> Json:
        answers = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(self.body)["objects"]]
        for answer in answers:
            if answer["oid"] not in self.hub.uploads:
                upload, verify = f"/_upload/{answer['oid']}", f"/{repo.path}.git/info/lfs/verify"
                answer["actions"] = {"upload": {"href": self.base + upload}, "verify": {"href": self.base + verify}}
        return {"transfer": "basic", "objects": answers}

    @route("PUT", r"/_upload/(?P<oid>\w+)")  # without a token: on the Hub this address is a signed one of its storage
    def upload(self, oid: str) -> Json:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the sha256 that was announced")
        self.hub.uploads[oid] = self.body
        return {}

    @route("POST", rf"{WEB}\.git/info/lfs/verify", write=True)
    def lfs_verify(self, repo: Repo) -> Json:
        wanted = json.loads(self.body)
        if len(self.hub.uploads.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(400, f"{repo.id}: no upload of {wanted['size']} bytes has sha256 {wanted['oid']}")
        return {}

    @route("POST", f"{API}/commit/{REV}", write=True)
    def commit(self, repo: Repo, revision: str) -> Json:
        if "create_pr" in self.query or revision not in repo.branches:
            raise HubError(501, "hub_server.py commits to branches that exist")
        with self.hub.lock:
            head = repo.at(revision)
            files, title = dict(head.files), ""
            for line in map(json.loads, self.body.splitlines()):
                if line["key"] != "header":
                    self.change(files, line["key"], line["value"])
                elif line["value"].get("parentCommit", head.sha) != head.sha:
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
                else:
                    title = line["value"]["summary"]
            sha = repo.commit(revision, files, title).sha
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.base}/{repo.path}/commit/{sha}"}

    def change(self, files: dict[str, Blob], key: str, value: Json) -> None:
        path = value["path"].rstrip("/")
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.uploads:
                raise HubError(400, f"{path}: its content was never uploaded")
            files[path] = Blob(self.hub.uploads[value["oid"]], lfs=True)
        else:  # deletedFile, deletedFolder
            gone = [name for name in files if name == path or name.startswith(f"{path}/")]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]


def entries(commit: Commit) -> dict[str, Json]:
    """The files and the folders above them, as tree and paths-info list them."""
    listing: dict[str, Json] = {}
    for path, blob in sorted(commit.files.items()):
        for folder in map(str, reversed(PurePosixPath(path).parents[:-1])):
            listing[folder] = {"type": "directory", "oid": sha1(commit.sha + folder), "size": 0, "path": folder}
        listing[path] = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path, **blob.pointer("oid")}
    return listing


def count_parameters(commit: Commit) -> Counter[str]:
    counts: Counter[str] = Counter()
    for path, blob in commit.files.items():
        if path.endswith(".safetensors"):
            try:
                header = json.loads(blob.data[8 : 8 + int.from_bytes(blob.data[:8], "little")])
            except ValueError:
                continue  # a test may push a file that only has the name
            for tensor in [header[name] for name in header if name != "__metadata__"]:
                counts[tensor["dtype"]] += math.prod(tensor["shape"])
    return counts


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


def sha1(content: str | bytes) -> str:
    return hashlib.sha1(content.encode() if isinstance(content, str) else content).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve folders as the repositories of a local Hub.")
    parser.add_argument("--seed", action="append", default=[], metavar="KIND:ORG/NAME:FOLDER", help="repeatable")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    with HubServer(host=arguments.host, port=arguments.port) as hub:
        for seed in arguments.seed:
            kind, repo_id, folder = seed.split(":", 2)
            print(kind, repo_id, hub.add(kind, repo_id, folder))
        print(f"export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1  # tokens: {' '.join(hub.tokens)}", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
