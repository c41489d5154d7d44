"""The client's session: how long each request waits, and what is said meanwhile."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import httpx
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import hf_request_event_hook

from finetune.errors import HubError, first_line

# seconds: for a connection, for an answer, until silence is told, and that a busy Hub may ask to wait
CONNECT, ANSWER, QUIET, LONGEST = 10.0, 60.0, 8.0, 60
PASSING = (408, 425, 429, 500, 502, 503, 504)  # status codes of a Hub that is busy, or broken for a while
NETWORK = "Check the network, the proxy or HF_ENDPOINT (the address of a mirror, where the Hub cannot be reached)"


class GaveUp(httpx.TransportError):
    """A request has failed twice, or has waited in vain. The client does not know this error, so it does not go on to repeat it in silence."""


class Unreached(HubError):
    """There is no way to the Hub, or it gave no answer."""


class Session(httpx.Client):
    """The client's session, with the time-outs that it lacks: some of its calls would wait for ever, others six times over."""

    # the requests that failed the last time; not of one session, since the client may close it and make another
    failed: ClassVar[set[tuple[str, str]]] = set()

    def send(self, request: httpx.Request, **kwargs: Any) -> httpx.Response:
        given = request.extensions.get("timeout") or {}
        longest = max(ANSWER, constants.HF_HUB_DOWNLOAD_TIMEOUT)
        limits = dict(connect=CONNECT, read=longest, write=longest, pool=longest)
        limits = {name: min(given.get(name) or limit, limit) for name, limit in limits.items()}
        request.extensions["timeout"], patience = limits, limits["read"]
        call, host = (request.method, str(request.url)), request.url.host
        silence = f"Hub: {host} does not answer; waiting up to {patience:g} s"
        told = threading.Timer(QUIET, print, [silence], dict(flush=True))
        told.daemon = True
        if request.method != "PUT":  # which sends whole files
            told.start()
        try:
            response = super().send(request, **kwargs)
        except httpx.TransportError as error:
            late = isinstance(error, httpx.TimeoutException)
            # a download that is late may be in the cache, so the client hears of it
            if call not in self.failed and not (late and request.method not in ("GET", "HEAD")):
                self.failed.add(call)
                raise
            self.failed.discard(call)
            raise GaveUp(f"no answer in {patience:g} s" if late else first_line(error), request=request) from error
        finally:
            told.cancel()
        self.failed.discard(call)
        if response.status_code in PASSING:
            wait = response.headers.get("retry-after", "")
            print(f"Hub: {host} is busy or broken (HTTP {response.status_code})", flush=True)
            if wait.isdecimal() and int(wait) > LONGEST:
                response.close()
                raise HubError(
                    f"the Hub is busy (HTTP {response.status_code}) and asks to wait {wait} s; try again after that"
                )
        page = response.headers.get("content-type", "").startswith("text/html")
        if page and response.is_success and not request.url.path.endswith((".html", ".htm")):
            response.close()
            raise Unreached(
                f"{host} answers with a web page in place of data, as networks with a log-in and some proxies do. Open it in "
                f"a browser, and log in to the network. {NETWORK}."
            )
        return response


# the hook is what the client's own factory gives to its sessions: HF_HUB_OFFLINE acts there
set_client_factory(
    lambda: Session(event_hooks={"request": [hf_request_event_hook]}, follow_redirects=True, timeout=None)
)
