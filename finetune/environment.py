"""The environment that the libraries see: their own variables, set before any of them is imported."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from finetune import files
from finetune.errors import SettingsError
from finetune.settings import Settings, declarations

# nothing phones home (unsloth #3680 hung behind firewalls on its start-up call), and no window is opened for a plot
ALWAYS = {
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "WANDB_SILENT": "true",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # `data` has no torch on purpose
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",  # the tokenizing processes are forked
    "TORCHINDUCTOR_COMPILE_THREADS": "4",  # a layer has some 20 kernels; a process for each core takes 3 s to end, on 16 cores
}
# These change the numbers that come out: run.json records them, and `reproduce` sets them as recorded. The number of threads
# changes them too; it is recorded as torch counts it (`cpu_threads`), whoever set it.
NUMERIC = (
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "UNSLOTH_COMPILE_DISABLE",
    "UNSLOTH_FORCE_FLOAT32",
)
# The place of each below XDG_CACHE_HOME if the user did not set it. The first two are for programs that have no variable here.
CACHES = {
    "HOME": "",
    "XDG_CACHE_HOME": "",
    "HF_HOME": "huggingface",
    "TORCH_HOME": "torch",
    "TRITON_CACHE_DIR": "finetune/triton",
    "TORCHINDUCTOR_CACHE_DIR": "finetune/inductor",
    "CUDA_CACHE_PATH": "finetune/cuda",
    "UNSLOTH_COMPILE_LOCATION": "finetune/unsloth_compiled_cache",
    "MPLCONFIGDIR": "finetune/matplotlib",
}
COMPILED = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")  # programs are loaded from there


def dotenv(path: Path) -> dict[str, str]:
    """The variables of a .env file; {} where there is none. Raises SettingsError that names each line with no meaning."""
    if not path.is_file():
        return {}
    from dotenv.parser import parse_stream

    try:
        with open(path, encoding="utf-8-sig") as stream:
            bindings = list(parse_stream(stream))
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from None
    # python-dotenv skips what it cannot parse, and gives a name without = no value: the run would take the default
    if odd := [
        str(binding.original.line)
        for binding in bindings
        if binding.error or "\0" in binding.original.string or (binding.key and binding.value is None)
    ]:
        raise SettingsError(
            f"{path}: not understood in line {', '.join(odd)}; each line is NAME=value, for example MAX_STEPS=60"
        )
    return {binding.key: binding.value for binding in bindings if binding.key and binding.value}


def layered(file: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` wins over .env. An empty variable counts as unset, except CUDA_VISIBLE_DEVICES, where empty hides every GPU."""
    return {**file, **{name: value for name, value in environ.items() if value or name == "CUDA_VISIBLE_DEVICES"}}


def variables(settings: Settings, layered: Mapping[str, str], cpus: int | None = None) -> dict[str, str]:
    """What to add to the process's environment. What the user set stays as it is. cpus: how many may compute; None: all."""
    ours = {d.name for d in declarations()}
    wanted = {name: value for name, value in layered.items() if name not in ours}
    output = Path(settings.output_dir).absolute()
    defaults = dict(ALWAYS, TENSORBOARD_LOGGING_DIR=str(output / "tensorboard"), WANDB_DIR=str(output))
    if cpus is not None:  # torch would start a thread for each core, and they would take the quota from each other
        defaults["OMP_NUM_THREADS"] = str(cpus)
        defaults["TORCHINDUCTOR_COMPILE_THREADS"] = str(min(cpus, int(ALWAYS["TORCHINDUCTOR_COMPILE_THREADS"])))
    if settings.wandb_api_key:
        defaults["WANDB_API_KEY"] = settings.wandb_api_key.reveal()
    elif settings.report_to == "wandb":
        defaults["WANDB_MODE"] = "offline"  # without a key it would ask for one and wait (textgen #2517)
    if "HF_ENDPOINT" in layered:
        defaults["HF_HUB_DISABLE_XET"] = "1"  # xet does not use the endpoint (huggingface_hub #4475)
    visible = layered.get("CUDA_VISIBLE_DEVICES", "0")
    wanted["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]  # two visible GPUs become DataParallel (unsloth #2435)
    return {**defaults, **wanted, **_caches(layered)}


def _caches(layered: Mapping[str, str]) -> dict[str, str]:
    """A writable place for each cache: the one named, or a temporary folder where that cannot be written."""
    home = layered.get("HOME", "")
    below = layered.get("XDG_CACHE_HOME") or (home and f"{home}/.cache")
    named = {name: layered.get(name) or (below and f"{below}/{part}") for name, part in CACHES.items()} | {"HOME": home}
    lost = [name for name, place in named.items() if not (place and _writable(Path(place)))]
    noexec = [name for name in COMPILED if name not in lost and not files.runs_programs(Path(named[name]))]
    hub = Path(named["HF_HOME"] or "/nonexistent") / "hub"
    readable = "HF_HOME" in lost and os.access(hub, os.R_OK | os.X_OK)  # a cache mounted read-only still has its models
    for names, why in ((lost, "cannot be written"), (noexec, "hold no programs (mounted noexec)")):
        if names:
            temporary = _temporary()
            print(
                f"caches: {', '.join(names)} {why} and go to {temporary}, which may be deleted after this run",
                flush=True,
            )
            named |= {name: f"{temporary}/{CACHES[name]}" for name in names}
    if readable and "HF_HUB_CACHE" not in layered:
        print(f"caches: models are read from {hub}", flush=True)
        named["HF_HUB_CACHE"] = str(hub)
    return {name: str(Path(place)) for name, place in named.items()} | {
        "USER": layered.get("USER") or f"uid{os.getuid()}"
    }


def _temporary() -> Path:
    """A folder that this user owns. A folder made by someone else is not used, because compiled code is loaded from it."""
    place = Path(files.temporary()) / f"finetune-cache-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        place.mkdir(mode=0o700)
    found = place.lstat()
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return place if own else Path(tempfile.mkdtemp(prefix="finetune-cache-"))


def _writable(place: Path) -> bool:
    """Whether the folder is there or could be made, and files could be made in it."""
    existing = files.existing(place)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
