"""The Hub: who the token belongs to, the model's files at one commit, and publishing what is on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from finetune import blobs, files
from finetune.errors import HubError, MachineError, SettingsError, first_line, without_password
from finetune.machine.preflight import INDEX as INDEX
from finetune.machine.preflight import safetensors_header
from finetune.machine.preflight import weight_files as weight_files
from finetune.settings import Settings

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
OLD_WEIGHTS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
TEXTS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
EXCLUDED = ["*/*", "consolidated*"]  # other forms of the same weights
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# what AutoProcessor reads beside the tokenizer, of models that take pictures or sound
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """What a name stood for when it was loaded. commit: of the Hub repository, None for a folder.

    mends: a file of the cache that is not what the Hub names it is removed, so that it comes down again.
    """

    name: str
    commit: str | None
    folder: Path
    mends: bool = False

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of each file that decides what is trained on and merged into, under its name.

        It tells one model from another wherever its folder stands. A folder's files are read each time, which warms them for
        loading; those of the Hub's cache once. Raises HubError where one of these is not what the Hub names it.
        """
        return self.hashing.result()

    @functools.cached_property
    def hashing(self) -> Future[dict[str, str]]:
        """`digests`, begun in a thread: 16 GB take seconds, in which the libraries can be imported."""
        future: Future[dict[str, str]] = Future()

        def work() -> None:
            try:
                future.set_result(self._digests())
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def _digests(self) -> dict[str, str]:
        names = [*weight_files(self.folder), "config.json", "generation_config.json", *TOKENIZER_FILES]
        names += PROCESSOR_FILES
        there = [name for name in names if (self.folder / name).is_file()]
        return self.checked(there) if self.commit else files.digests(self.folder, there)

    def checked(self, names: Iterable[str]) -> dict[str, str]:
        """sha256 of these files of the Hub's cache. Raises HubError with each that is not what the Hub names it."""
        from huggingface_hub import constants

        paths = {name: (self.folder / name).resolve() for name in names}
        again = f"the same command downloads it again{' without HF_HUB_OFFLINE' if constants.is_offline_mode() else ''}"
        found = blobs.read(self.folder.parent.parent, paths.values())
        problems = []
        for name, path in paths.items():
            blob = found[path]
            if blob.found == blob.named:
                continue
            if self.mends:
                files.remove(self.folder / name, ignore_errors=True)
                files.remove(path, ignore_errors=True)
            way_out = f"Remove {path}" if os.path.lexists(path) else "It is removed"
            problems.append(
                f"MODEL_NAME={self.name}: {name} is not the file that the Hub has: its hash is {blob.found}, expected was "
                f"{blob.named}. A mirror, a proxy or a disk has changed it{f'. {way_out}, and {again}' if self.mends else ''}"
            )
        if problems:
            raise HubError(*problems)
        return {name: found[path].sha256 for name, path in paths.items()}

    def checked_where_read(self) -> None:
        """Check what is read before the weights, and weights whose header tells that they are damaged; the rest is `hashing`."""
        names = sorted(path.name for path in self.folder.iterdir() if path.is_file())
        self.checked(name for name in names if not name.endswith((".safetensors", ".bin")))
        for name in names:
            if name.endswith(".safetensors"):
                try:
                    safetensors_header(self.folder / name, whole=True)
                except MachineError:
                    self.checked([name])
                    raise

    def config(self) -> dict[str, Any]:
        """The model's config.json; {} where there is none."""
        try:
            found = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}  # who loads the model says what is wrong


def token(settings: Settings) -> str | bool:
    """The token for one call; False keeps the client from looking for a saved one that the user did not name."""
    return settings.hf_token.reveal() if settings.hf_token else False


def login(settings: Settings, publishes: bool) -> None:
    """Where there is a token, ask the Hub whose it is, and print name and rights. Nothing is written to disk.

    Raises HubError where the token is refused, or may not write although this call `publishes`.
    """
    if settings.hf_token is None:
        return
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        if publishes:
            raise HubError("HF_HUB_OFFLINE=1: publishing needs the Hub; unset it, or do not publish (PUSH_TO_HUB=0)")
        print("Hub: offline, the token is not checked", flush=True)
        return
    with explained("HF_TOKEN", settings):
        answer = HfApi(token=token(settings)).whoami()
    writes = may_write(answer)
    print(
        f"Hub: logged in as {answer['name']}; the token may {'read and write' if writes else 'only read'}", flush=True
    )
    if publishes and not writes:
        raise HubError(
            "HF_TOKEN: publishing needs the right to write, and this token may only read. Make one with the right to write in the Hub's settings, Access "
            "Tokens, and give it in HF_TOKEN."
        )


def may_write(whoami: dict[str, Any]) -> bool:
    """Whether whoami's answer tells of a token that may write to some repository."""
    access = whoami.get("auth", {}).get("accessToken", {})
    if access.get("role") != "fineGrained":
        return access.get("role") == "write"
    scopes = access.get("fineGrained", {})
    granted = [
        *scopes.get("global", []),
        *(p for scope in scopes.get("scoped", []) for p in scope.get("permissions", [])),
    ]
    return "repo.write" in granted


def fetch_model(settings: Settings) -> Source:
    """The model's folder: a local one as it is, or a Hub repository downloaded at the commit its revision names now.

    The 16-bit repository is fetched once and serves both: quantised at load for training, read again by the merge.
    A quantised mirror would train on other weights than the merge adds to (unsloth #1089, peft #2321).

    Raises SettingsError where the name stands for no model that can be trained, HubError where the Hub does not give it.
    """
    if problem := missing(settings):
        raise SettingsError(problem)
    source = _fetched(settings)
    if source.commit:
        source.checked_where_read()
    if (source.folder / "adapter_config.json").is_file():
        # transformers would load it too, and the merge would add to the weights without it
        raise SettingsError(
            f"MODEL_NAME={source.name}: holds an adapter (adapter_config.json) beside the model, and it is not clear which of them is "
            "meant; name the model alone, or one that the adapter is merged into"
        )
    return source


def _fetched(settings: Settings) -> Source:
    name = settings.model_name
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(name, None, folder)
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    asked: dict[str, Any] = dict(repo_id=name, revision=settings.model_revision, token=token(settings))
    with explained("MODEL_NAME", settings):
        try:
            config = Path(hf_hub_download(filename="config.json", **asked))
        except errors.RemoteEntryNotFoundError:
            raise SettingsError(
                f"MODEL_NAME={name}: has no config.json, so it is no model that can be trained (GGUF files, or an adapter alone); "
                "name the model that it was made of, in 16 bits"
            ) from None
        asked["revision"] = config.parent.name  # the commit, so that all files are of the same one
        source = Source(name, config.parent.name, config.parent, mends=True)
        source.checked(["config.json"])
        if problem := quantised(source):  # 40 GB before it could be refused would be too late
            raise SettingsError(problem)
        found = Path(snapshot_download(**asked, allow_patterns=[*WEIGHTS, *TEXTS], ignore_patterns=EXCLUDED))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(**asked, allow_patterns=[*OLD_WEIGHTS, *TEXTS], ignore_patterns=EXCLUDED))
    if not any(found.glob("*.safetensors")) and not any(found.glob("pytorch_model*.bin")):
        raise SettingsError(
            f"MODEL_NAME={name}: holds no safetensors or pytorch weights (GGUF and the like cannot be trained)"
        )
    return source


FILES = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".zst", ".zip", ".txt", ".gguf", ".safetensors", ".bin")
QUANTISED = re.compile(
    r"(?i)[-_.](unsloth-bnb-4bit|bnb-[48]bit|gptq|awq|fp8|mxfp4|nvfp4|quantized\.w\d+a\d+|w\d+a\d+|int[48]|[48]bit)([-_.].*)?$"
)


def quantised(source: Source) -> str | None:
    """The sentence for a base whose config.json tells that its weights are quantised; None: they are not.

    It would train on these whatever LOAD_IN_4BIT says, and nothing can be merged into them.
    """
    config = source.config()
    sections = [config, *(config[key] for key in ("text_config", "llm_config", "language_config") if key in config)]
    keys = ("quantization_config", "compression_config")
    found = [section[key] for section in sections if isinstance(section, dict) for key in keys if section.get(key)]
    if not found:
        return None
    method = _method(found[0] if isinstance(found[0], dict) else {})
    name = source.name if source.commit else Path(source.name).absolute().name
    guess = QUANTISED.sub("", name)
    if config.get("model_type") == "gpt_oss" and guess == name:
        guess = f"unsloth/{name.rpartition('/')[2]}-BF16"
    original = (
        f"16-bit original, by its name probably MODEL_NAME={guess}"
        if guess != name
        else "16-bit original, or a 16-bit copy of it"
    )
    return (
        f"MODEL_NAME={source.name}: its weights are quantised ({method}), and a run needs 16-bit ones; name the {original} "
        "(LOAD_IN_4BIT=1 holds that in 4 bits too)"
    )


def _method(config: dict[str, Any]) -> str:
    """The way in which weights are quantised, in words."""
    name = str(config.get("quant_method") or "").lower()
    if name in ("", "bitsandbytes") and (config.get("load_in_4bit") or config.get("_load_in_4bit")):
        return f"bitsandbytes {config.get('bnb_4bit_quant_type') or '4 bit'}"
    if name in ("", "bitsandbytes") and (config.get("load_in_8bit") or config.get("_load_in_8bit")):
        return "bitsandbytes int8"
    bits = config.get("bits") or config.get("w_bit")
    detail = config.get("format") if name == "compressed-tensors" else f"{bits} bit" if bits else None
    return f"{name or 'method unknown'}{f' {detail}' if detail else ''}"


def missing(settings: Settings) -> str | None:
    """What is wrong with a MODEL_NAME that is a path, in a sentence; None: nothing, or it is a name on the Hub."""
    name = settings.model_name
    folder = Path(name).expanduser()
    if problem := url("MODEL_NAME", name):
        return problem
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            return f"MODEL_NAME={name}: the folder has no config.json, so it is not a model's folder"
        if problem := quantised(Source(name, None, folder)):
            return problem
        try:
            weight_files(folder)
        except SettingsError as error:
            return str(error)
        return None
    if os.path.exists(folder):
        return f"MODEL_NAME={name}: is a file; it takes a model's folder or a Hub name such as owner/name"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"MODEL_NAME={name}: there is no such folder; it takes a folder or a Hub name such as owner/name"
    return None


def url(variable: str, value: str) -> str | None:
    """The sentence for a URL where a name or a path is wanted; None: it is none."""
    if not (parts := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://([^?#]*)", value)):
        return None
    shown = without_password(parts[0])  # what follows a question mark may be a key
    scheme, place = parts[1].lower(), shown.partition("://")[2].rstrip("/")
    if scheme == "file":
        return f"{variable}={shown}: is a URL; give the path alone, for example {variable}={place}"
    repository = re.split(r"/(?:tree|blob|resolve|raw|viewer)(?:/|$)|@", place)[0].split("/")[scheme != "hf" :][-2:]
    what = "is a URL; it takes a Hub name or a path on this machine"
    if scheme in ("http", "https", "hf") and len(repository) == 2 and Path(repository[1]).suffix.lower() not in FILES:
        return f"{variable}={shown}: {what}. For a repository of the Hub give owner and name, for example {variable}={'/'.join(repository)}"
    return f"{variable}={shown}: {what}. Download it, and give its path, for example {variable}=./{repository[-1] if repository else 'rows.jsonl'}"


def cached(name: str, commit: str | None) -> Source | None:
    """A model that is on this machine already: a commit in the Hub's cache, or a folder. No network; None: it is not."""
    from huggingface_hub import errors, snapshot_download

    if commit is not None:
        with contextlib.suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
            found = Path(snapshot_download(name, revision=commit, local_files_only=True, token=False))
            return Source(name, commit, found)
    folder = Path(name).expanduser()
    return Source(name, None, folder) if folder.is_dir() else None


@contextlib.contextmanager
def explained(variable: str, settings: Settings) -> Iterator[None]:
    """Turn the client's exceptions into sentences that name the variable and the way out: SettingsError, HubError, MachineError."""
    import httpx
    from huggingface_hub import constants, errors

    name, revision = {
        "MODEL_NAME": (settings.model_name, settings.model_revision),
        "DATASET_NAME": (settings.dataset_name, settings.dataset_revision),
        "HUB_MODEL_ID": (settings.hub_model_id, "main"),
        "HUB_MERGED_MODEL_ID": (settings.hub_merged_model_id, "main"),
    }.get(variable, ("<SECRET>", ""))
    shown = f"{variable}={name}"
    try:
        if not constants.is_offline_mode():
            httpx.Client().close()  # reads the proxies, and raises what it cannot use before anybody asks the Hub
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise HubError(
            f"http_proxy, https_proxy or all_proxy: cannot be used ({first_line(error)}); it takes an http proxy, for example "
            "https_proxy=http://127.0.0.1:7890"
        ) from None
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(
            f"{shown}: access must be asked for on the repository's page, and HF_TOKEN must belong to the account that got it"
        ) from None
    except errors.RepositoryNotFoundError:
        raise SettingsError(
            f"{shown}: the Hub has no such repository, or it is private and HF_TOKEN has no access to it; "
            f"for example {'FreedomIntelligence/medical-o1-reasoning-SFT' if variable == 'DATASET_NAME' else 'unsloth/DeepSeek-R1-Distill-Llama-8B'}"
        ) from None
    except errors.RevisionNotFoundError:
        raise SettingsError(
            f"{variable.replace('_NAME', '_REVISION')}={revision}: {name} has no such branch, tag or commit, for example main"
        ) from None
    except errors.HFValidationError:
        raise SettingsError(
            f"{shown}: not a repository name; it takes owner/name, or the path of a folder that exists"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        cause = error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        why = "the Hub cannot be reached" if status is None else f"the Hub answered HTTP {status}"
        if isinstance(cause, errors.OfflineModeIsEnabled):
            why = "HF_HUB_OFFLINE is set"
        raise HubError(
            f"{shown}: {why}, and it is not in the cache. Check the network, the proxy, HF_ENDPOINT and the token's rights, or "
            "give a local path."
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        if variable == "HF_TOKEN" and status == 401:
            raise HubError(
                "HF_TOKEN: the Hub refuses this token; make a new one in its settings, Access Tokens"
            ) from None
        if status in (401, 403):
            raise HubError(
                f"{shown}: HF_TOKEN is not allowed to do this (HTTP {status}); use a token with the right to it"
            ) from None
        raise HubError(f"{shown}: the Hub answered HTTP {status} ({first_line(error)}); try again") from None
    except (httpx.HTTPError, ConnectionError, TimeoutError) as error:
        raise HubError(
            f"{shown}: the Hub cannot be reached ({first_line(error)}). Check the network, the proxy or HF_ENDPOINT."
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise MachineError(f"{shown}: the disk is full; free some or point HF_HOME to a larger one") from None
        raise


def publish(settings: Settings, output: Path) -> None:
    """Push what a run left in `output`, each folder with its card in one commit.

    The caller has checked the files' hashes. Raises HubError for all that follows, with everything still on disk.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token(settings))
    for folder, variable, repository in (
        ("adapter", "HUB_MODEL_ID", settings.hub_model_id),
        ("merged", "HUB_MERGED_MODEL_ID", settings.hub_merged_model_id),
    ):
        if repository is None:
            continue
        if not (output / folder).is_dir():
            raise SettingsError(
                f"{output / folder}: is not there, so {variable} cannot be published; train first, or unset {variable}"
            )
        with _goes_on(settings), explained(variable, settings):
            full = api.create_repo(repository, private=settings.hub_private_repo, exist_ok=True).repo_id
            print(f"Hub: publishing {folder} to {full}", flush=True)
            _patiently(
                functools.partial(
                    api.upload_folder, repo_id=full, folder_path=output / folder, commit_message=f"Upload {folder}"
                )
            )
            print(f"published: {without_password(api.endpoint)}/{full}", flush=True)


def _patiently(call: Callable[[], Any]) -> Any:
    """Call again after a hiccup of the Hub: the client repeats its transfers, but not the commit at the end."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    for pause in (2, 8, 0):
        try:
            return call()
        except (HfHubHTTPError, httpx.TransportError) as error:
            status = getattr(getattr(error, "response", None), "status_code", 503)
            if not pause or status not in (429, 500, 502, 503, 504):
                raise
            print(f"Hub: HTTP {status}, trying again in {pause} s", flush=True)
            time.sleep(pause)


@contextlib.contextmanager
def _goes_on(settings: Settings) -> Iterator[None]:
    try:
        yield
    except (HubError, SettingsError, MachineError) as error:
        raise HubError(
            *error.problems,
            f"Everything is still in {settings.output_dir}. To publish it: python entrypoint.py push "
            f"HUB_MODEL_ID={settings.hub_model_id} OUTPUT_DIR={settings.output_dir} (or make push-hub); no GPU is needed.",
        ) from None
