"""What every call to the Hugging Face Hub needs: the token, and sentences for what the client raises."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import httpx
from huggingface_hub import constants, errors

from finetune.errors import HubError, MachineError, SettingsError, first_line
from finetune.settings import Settings


def token(settings: Settings) -> str | bool:
    """The token for one call; False keeps the client from looking for a saved one that the user did not name."""
    return settings.hf_token.reveal() if settings.hf_token else False


@contextlib.contextmanager
def explained(variable: str, name: str, revision: str = "main") -> Iterator[None]:
    """Turn the client's exceptions into SettingsError, HubError or MachineError that name variable and way out.

    name: the variable's value, as it may be shown.
    """
    shown = f"{variable}={name}"
    _check_proxies()
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(
            f"{shown}: access must be asked for on the repository's page, and HF_TOKEN must belong to the account that "
            "got it"
        ) from None
    except errors.RepositoryNotFoundError:
        raise SettingsError(
            f"{shown}: the Hub has no such repository, or it is private and HF_TOKEN has no access to it; "
            f"for example {Settings.dataset_name if variable == 'DATASET_NAME' else Settings.model_name}"
        ) from None
    except errors.RevisionNotFoundError:
        raise SettingsError(
            f"{variable.replace('_NAME', '_REVISION')}={revision}: {name} has no such branch, tag or commit, for "
            "example main"
        ) from None
    except errors.HFValidationError:
        raise SettingsError(
            f"{shown}: not a repository name; it takes owner/name, or the path of a folder that exists"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HubError(
            f"{shown}: {_unreached(error.__cause__ or error)}, and it is not in the cache. Check the network, the "
            "proxy, HF_ENDPOINT and the token's rights, or give a local path."
        ) from None
    except errors.HfHubHTTPError as error:
        raise HubError(_answered(error, variable, shown)) from None
    except (httpx.HTTPError, ConnectionError, TimeoutError) as error:
        raise HubError(
            f"{shown}: the Hub cannot be reached ({first_line(error)}). Check the network, the proxy or HF_ENDPOINT."
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise MachineError(f"{shown}: the disk is full; free some or point HF_HOME to a larger one") from None
        raise


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


def _unreached(cause: BaseException) -> str:
    """Why a file did not come from the Hub."""
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    status = getattr(getattr(cause, "response", None), "status_code", None)
    return "the Hub cannot be reached" if status is None else f"the Hub answered HTTP {status}"


def _answered(error: errors.HfHubHTTPError, variable: str, shown: str) -> str:
    """What an answer of the Hub means that is none of the client's own errors."""
    status = getattr(error.response, "status_code", "?")
    if variable == "HF_TOKEN" and status == 401:
        return "HF_TOKEN: the Hub refuses this token; make a new one in its settings, Access Tokens"
    if status in (401, 403):
        return f"{shown}: HF_TOKEN is not allowed to do this (HTTP {status}); use a token with the right to it"
    return f"{shown}: the Hub answered HTTP {status} ({first_line(error)}); try again"
