"""The border to the Hugging Face Hub: the token, and sentences for whatever the client raises.

All that is raised behind `talk` is the Hub's, the network's or the machine's, unless the traceback ends in our own files.
So no list of the client's errors has to be kept: only those are named here that have a better sentence.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from huggingface_hub import constants, errors

from finetune.errors import HubError, MachineError, Refusal, SettingsError, chain, first_line, of_machine, ours
from finetune.settings import Settings
from finetune.sources.session import LONGEST, NETWORK, PASSING, GaveUp, Unreached

T = TypeVar("T")
PAUSES = (2.0,)  # seconds before each repetition of a call


def token(settings: Settings) -> str | bool:
    """The token for one call; False keeps the client from looking for a saved one that the user did not name."""
    return settings.hf_token.reveal() if settings.hf_token else False


def talk(
    variable: str,
    name: str,
    call: Callable[[], T],
    revision: str = "main",
    otherwise: Callable[[Exception], Refusal] | None = None,
) -> T:
    """What `call` gives, which asks the Hub. It is repeated once where the fault may pass, so it has to be repeatable.

    name: the variable's value, as it may be shown. otherwise: what to raise for a fault that is not known to be of Hub,
    network or machine. Raises SettingsError, HubError or MachineError that names variable and way out for all that the
    client raises. What our own code raises in `call` goes through: it is a bug.
    """
    _check_proxies()
    for pause in (*PAUSES, None):
        try:
            return call()
        except Refusal as refusal:
            raise type(refusal)(*(_about(variable, name, problem) for problem in refusal.problems)) from None
        except Exception as error:
            if ours(error) and not isinstance(error, GaveUp):
                raise
            if pause is None or not (why := _passing(error)):
                known = _explained(error, variable, name, revision) or (otherwise and otherwise(error))
                raise known or HubError(
                    f"{variable}={name}: what came from the Hub is not what it should be ({type(error).__name__}: "
                    f"{first_line(error)}). {NETWORK}."
                ) from None
            wait = _wait(error) or pause
            print(f"Hub: {why}, trying again in {wait:g} s", flush=True)
            time.sleep(wait)
    raise AssertionError("the last pause is None")


def _about(variable: str, name: str, problem: str) -> str:
    """A sentence of ours from within the client, with the variable that it is about."""
    return problem if problem.startswith(variable) else f"{variable}={name}: {problem}"


def _answer(error: BaseException) -> tuple[httpx.Response, str] | None:
    """The Hub's answer, where that was the fault, and what it says."""
    for part in chain(error):
        if isinstance(response := getattr(part, "response", None), httpx.Response):
            return response, getattr(part, "server_message", None) or first_line(part)
    return None


def _is_network(error: BaseException) -> bool:
    """Whether a connection failed, or gave nothing in time. Of the client's own errors, two only look like one."""
    return isinstance(error, httpx.HTTPError | ConnectionError | TimeoutError) and not isinstance(
        error, errors.HfHubHTTPError | errors.OfflineModeIsEnabled
    )


def _passing(error: BaseException) -> str | None:
    """What to call a fault that may pass; None: it will not, or it has taken its time already."""
    if answer := _answer(error):
        return f"HTTP {answer[0].status_code}" if answer[0].status_code in PASSING else None
    broken = [part for part in chain(error) if _is_network(part)]
    late = any(isinstance(part, GaveUp | httpx.TimeoutException | httpx.ConnectError) for part in broken)
    return "the connection broke off" if broken and not late else None


def _wait(error: BaseException) -> float:
    """The seconds that the Hub asks to wait; 0: it does not."""
    answer = _answer(error)
    wait = answer[0].headers.get("retry-after", "") if answer else ""
    return min(float(wait), LONGEST) if wait.isdecimal() else 0


def _explained(error: Exception, variable: str, name: str, revision: str) -> Refusal | None:
    """The refusal for what the client raised; None: nothing in it tells what it is."""
    shown, parts = f"{variable}={name}", list(chain(error))
    if found := next(filter(None, (_of_its_kind(part, variable, name, revision) for part in parts)), None):
        return found
    if answer := _answer(error):
        return HubError(_answered(answer[0].status_code, answer[1], variable, shown))
    if any(isinstance(part, errors.OfflineModeIsEnabled) for part in parts):
        return HubError(
            f"{shown}: HF_HUB_OFFLINE is set, and it is not in the cache. Unset HF_HUB_OFFLINE, or give a local path."
        )
    if broken := next(filter(_is_network, parts), None):
        why = "no answer in time" if isinstance(broken, httpx.TimeoutException | TimeoutError) else first_line(broken)
        return Unreached(
            f"{shown}: the Hub cannot be reached ({why}). {NETWORK}. If all that is needed is in the cache, "
            "HF_HUB_OFFLINE=1 asks nobody."
        )
    return None


def _of_its_kind(part: BaseException, variable: str, name: str, revision: str) -> Refusal | None:
    """The refusal for an error of which the client, or the system, says what it is; None: another."""
    shown = f"{variable}={name}"
    if isinstance(part, Refusal):  # raised in a thread of the client's, which wrapped it
        return type(part)(*(_about(variable, name, problem) for problem in part.problems))
    if isinstance(part, errors.GatedRepoError):
        return HubError(
            f"{shown}: access must be asked for on the repository's page, and HF_TOKEN must belong to the account that "
            "got it"
        )
    if isinstance(part, errors.RepositoryNotFoundError):
        example = {"MODEL_NAME": Settings.model_name, "DATASET_NAME": Settings.dataset_name}.get(variable)
        return SettingsError(
            f"{shown}: the Hub has no such repository, or it is private and HF_TOKEN has no access to it"
            + (f"; for example {example}" if example else "")
        )
    if isinstance(part, errors.RevisionNotFoundError):
        return SettingsError(
            f"{variable.replace('_NAME', '_REVISION')}={revision}: {name} has no such branch, tag or commit, for "
            "example main"
        )
    if isinstance(part, errors.HFValidationError):
        return SettingsError(
            f"{shown}: not a repository name; it takes owner/name, or the path of a folder that exists"
        )
    if isinstance(part, OSError) and not _is_network(part) and (problem := of_machine(part)):
        return MachineError(f"{shown}: {problem} (HF_HOME names the place of downloads)")
    return None


def _answered(status: int, said: str, variable: str, shown: str) -> str:
    """What an answer of the Hub means that is none of the client's own errors."""
    if status in (401, 403):
        if variable == "HF_TOKEN" and status == 401:
            return "HF_TOKEN: the Hub refuses this token; make a new one in its settings, Access Tokens"
        return f"{shown}: HF_TOKEN is not allowed to do this (HTTP {status}); use a token with the right to it"
    meanings = {
        404: "; it does not have what was asked for",
        412: "; somebody else has changed the repository meanwhile. Look at it, and repeat the command",
        413: "; that is more than the Hub or the account takes. Make room in the account, or publish the adapter alone",
        507: "; the account's storage is full. Make room in it, or publish the adapter alone",
    }
    return f"{shown}: the Hub answered HTTP {status} ({said})" + (
        "; try again later" if status in PASSING else meanings.get(status, "; it refuses this")
    )


def _check_proxies() -> None:
    """Raise HubError for proxies that cannot be used, before anybody asks the Hub."""
    try:
        if not constants.is_offline_mode():
            httpx.Client().close()  # reads the proxies
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise HubError(
            f"http_proxy, https_proxy or all_proxy: cannot be used ({first_line(error)}); it takes an http proxy, for "
            "example https_proxy=http://127.0.0.1:7890"
        ) from None
