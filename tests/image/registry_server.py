"""A real registry (Debian's docker-registry) on this machine, which gives tokens for a login, as public registries do."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import ROOT

USER, PASSWORD = "user-of-a-test", "password-of-a-test"


def install(folder: Path) -> str:
    """The registry's program; where it is not installed, root on Debian unpacks it into `folder`."""
    if program := shutil.which("docker-registry"):
        return program
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("no docker-registry is installed, and only root on Debian can fetch it here")
    subprocess.run([ROOT / "scripts/apt_install.sh", "--to", str(folder), "docker-registry"], check=True)
    return str(folder / "usr/bin/docker-registry")


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


class Tokens(BaseHTTPRequestHandler):
    """https://distribution.github.io/distribution/spec/auth/token/: the right password gets what it asks for, all others nothing."""

    folder: Path

    def do_GET(self) -> None:
        asked = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        login = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != login:
            self.send_response(401)
            self.end_headers()
            return
        scopes = [scope.split(":") for scope in " ".join(asked.get("scope", [])).split()]
        access = [{"type": kind, "name": name, "actions": actions.split(",")} for kind, name, actions in scopes]
        body = json.dumps({"token": self.token(access)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def token(self, access: list[dict[str, object]]) -> str:
        certificate = "".join((self.folder / "cert.pem").read_text().splitlines()[1:-1])
        now = int(time.time())
        claims = {
            "iss": "tests",
            "sub": USER,
            "aud": "tests",
            "exp": now + 600,
            "nbf": now - 10,
            "iat": now,
            "jti": "1",
        }
        parts = ({"typ": "JWT", "alg": "RS256", "x5c": [certificate]}, {**claims, "access": access})
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in parts)
        words = ["openssl", "dgst", "-sha256", "-sign", str(self.folder / "key.pem")]
        signature = subprocess.run(words, input=signed.encode(), check=True, capture_output=True).stdout
        return f"{signed}.{_encoded(signature)}"

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running(folder: Path) -> Iterator[str]:
    """The registry's host:port."""
    program = install(folder / "program")
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tests", "-days", "1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*words, *files], check=True, capture_output=True)
    tokens = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Tokens,), {"folder": folder}))
    threading.Thread(target=tokens.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{_port()}"
    token = {
        "realm": f"http://127.0.0.1:{tokens.server_port}/token", "service": "tests", "issuer": "tests",
        "rootcertbundle": str(folder / "cert.pem"),
    }  # fmt: skip
    storage = {"filesystem": {"rootdirectory": str(folder / "storage")}, "delete": {"enabled": True}}
    config = {
        "version": "0.1",
        "log": {"level": "error"},
        "storage": storage,
        "http": {"addr": host},
        "auth": {"token": token},
    }
    (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(host.rpartition(":")[2]))) == 0:
                    break
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield host
    finally:
        server.terminate()
        server.wait(20)
        tokens.shutdown()
        tokens.server_close()
