"""What a launcher of several processes leaves in the environment: torchrun, accelerate, mpirun, a job operator of Kubernetes.

One process trains here. The libraries would read these variables all the same: they wait for ever for processes that nobody
started, or compute in another way than run.json says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

from finetune.errors import SettingsError

SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PET_NNODES")
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
OTHERS = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "GROUP_WORLD_SIZE",
    "FORK_LAUNCHED",
)
BEGINNINGS = (
    *("ACCELERATE_", "TORCHELASTIC_", "PET_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "SMDATAPARALLEL_"),
    *("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "SM_FRAMEWORK_PARAMS", "SM_HP_MP_PARAMETERS"),
)


def alone(layered: Mapping[str, str], process: MutableMapping[str, str]) -> dict[str, str]:
    """`layered` without the variables of a launcher, which `process`, the environment of this process, loses too.

    Raises SettingsError where they say that this is one of several processes.
    """
    if problems := list(_several(layered)):
        raise SettingsError(*problems)
    names = [name for name, value in layered.items() if _of_launcher(name) and value]
    for name in {*names, *filter(_of_launcher, process)}:
        process.pop(name, None)
    if names:
        print(f"not used, since one process trains: {', '.join(sorted(names))}", flush=True)
    return {name: value for name, value in layered.items() if not _of_launcher(name)}


def _of_launcher(name: str) -> bool:
    return name in (*SIZES, *RANKS, *OTHERS) or name.startswith(BEGINNINGS)


def _several(layered: Mapping[str, str]) -> Iterator[str]:
    for name, least in (*((size, 1) for size in SIZES), *((rank, 0) for rank in RANKS)):
        value = layered.get(name, "").strip()
        if value.isdigit() and int(value) > least:
            meant = "; if the adapter's rank is meant: LORA_R=" + value if name == "RANK" else ""
            yield (
                f"{name}={value}: a launcher (torchrun, accelerate, mpirun, a training job of Kubernetes) started several processes for "
                f"this run, and one process trains here, on one GPU. Start the command itself, once, in a job with one replica; or "
                f"unset {name} if nobody started others{meant}"
            )
