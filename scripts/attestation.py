"""What is said of a published image, and the signature under it. For publish_image.py; the reasons are in docs/adr/0105."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SBOM = "application/vnd.cyclonedx+json"
IN_TOTO = "application/vnd.in-toto+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PREDICATES = {"sbom": "https://cyclonedx.org/bom", "provenance": "https://slsa.dev/provenance/v1"}
OIDC = (
    "ACTIONS_ID_TOKEN_REQUEST_URL",
    "SIGSTORE_ID_TOKEN",
    "GOOGLE_SERVICE_ACCOUNT_NAME",
    "BUILDKITE_AGENT_ACCESS_TOKEN",
)


def statement(name: str, digest: str, predicate_type: str, predicate: Mapping[str, Any]) -> bytes:
    """An in-toto statement, https://in-toto.io/Statement/v1: `predicate` is said of the image name@digest."""
    kind, _, value = digest.partition(":")
    said = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {kind: value}}],
        "predicateType": predicate_type,
        "predicate": dict(predicate),
    }
    return json.dumps(said, separators=(",", ":")).encode()


def provenance(
    build: Mapping[str, Any], labels: Mapping[str, str], cuda: str, began: str, ended: str
) -> dict[str, Any]:
    """A SLSA v1 provenance: what the image was built from, by whom, when."""
    environ = os.environ
    host = {key: environ.get(f"GITHUB_{key}", "") for key in ("SERVER_URL", "REPOSITORY", "WORKFLOW_REF", "RUN_ID")}
    on_host = all(host.values())
    source = build["source"] or "the commit's repository has no public address"
    base = labels["org.opencontainers.image.base.name"]
    _, at, digest = base.partition("@sha256:")
    return {
        "buildDefinition": {
            "buildType": f"{source}#make-image",
            "externalParameters": {"CUDA": cuda, "BASE": base, "LOCK": build["lock"]},
            "resolvedDependencies": [
                {"uri": source, "digest": {"gitCommit": build["revision"]}},
                {"uri": f"docker/{build['lock']}", "digest": {"sha256": build["lock_sha256"]}},
                {"uri": base, **({"digest": {"sha256": digest}} if at else {})},
            ],
        },
        "runDetails": {
            "builder": {
                "id": f"{host['SERVER_URL']}/{host['WORKFLOW_REF']}" if on_host else f"{source}#make-publish-image"
            },
            "metadata": {
                "invocationId": f"{host['SERVER_URL']}/{host['REPOSITORY']}/actions/runs/{host['RUN_ID']}"
                if on_host
                else began,
                "startedOn": began,
                "finishedOn": ended,
            },
        },
    }


def signing() -> str | None:
    """How statements are signed here: `key`, `oidc`, or None."""
    if os.environ.get("SIGNING_KEY"):
        return "key"
    return "oidc" if any(os.environ.get(name) for name in OIDC) else None


def signing_problem() -> str | None:
    """Why this machine could not sign at the end what it builds now. SIGNING_KEY: a private key in PEM, without a password."""
    how = signing()
    try:
        if how == "key":
            _public_key()
        elif how == "oidc":
            _identity()
    except (OSError, subprocess.CalledProcessError) as error:
        text = (getattr(error, "stderr", b"") or str(error).encode()).decode(errors="replace").strip().splitlines()
        made = "openssl ecparam -genkey -name prime256v1 -noout -out key.pem"
        return f"SIGNING_KEY is no private key in PEM without a password ({text[0] if text else 'empty'}). One is made by: {made}"
    except RuntimeError as error:
        return f"this machine says that it has an identity (OIDC), and Sigstore's client gets none: {error}"
    return None


def sign(said: bytes, how: str) -> bytes:
    """A Sigstore bundle of the statement `said`, as cosign reads it."""
    return _sign_by_oidc(said) if how == "oidc" else _sign_by_key(said)


def _sign_by_key(said: bytes) -> bytes:
    key = os.environ["SIGNING_KEY"]
    message = pae(said)
    signed = subprocess.run(
        ["openssl", "dgst", "-sha256", "-sign", key], input=message, capture_output=True, check=True
    )
    hint = base64.b64encode(hashlib.sha256(_public_key()).digest()).decode()
    envelope = {
        "payload": base64.b64encode(said).decode(),
        "payloadType": IN_TOTO,
        "signatures": [{"sig": base64.b64encode(signed.stdout).decode(), "keyid": ""}],
    }
    bundle = {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": envelope,
    }
    return json.dumps(bundle, separators=(",", ":")).encode()


def pae(said: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding, https://github.com/secure-systems-lab/dsse."""
    return b"DSSEv1 %d %s %d %s" % (len(IN_TOTO), IN_TOTO.encode(), len(said), said)


def _public_key() -> bytes:
    """In DER. From a file alone: the key itself never stands in a process list."""
    key = Path(os.environ["SIGNING_KEY"])
    words = ["openssl", "pkey", "-in", str(key), "-pubout", "-outform", "DER", "-passin", "pass:"]
    return subprocess.run(words, capture_output=True, check=True).stdout


def _identity() -> str:
    """The token of this workflow's identity; it is good for some minutes."""
    # only here: the import takes longer than everything else
    from sigstore.oidc import IdentityError, detect_credential

    try:
        token = detect_credential()
    except IdentityError as error:
        raise RuntimeError(str(error)) from None
    if not token:
        raise RuntimeError("there is no token")
    return str(token)


def _sign_by_oidc(said: bytes) -> bytes:
    """By a certificate for this workflow's identity, which Sigstore writes into its public log."""
    from sigstore.dsse import Statement
    from sigstore.models import ClientTrustConfig
    from sigstore.oidc import IdentityToken
    from sigstore.sign import SigningContext

    context = SigningContext.from_trust_config(ClientTrustConfig.production())
    with context.signer(IdentityToken(_identity())) as signer:
        return signer.sign_dsse(Statement(said)).to_json().encode()
