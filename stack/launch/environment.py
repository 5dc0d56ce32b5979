"""The variables that the ranks of a host, and the launcher between, are started with."""

import os
from collections.abc import Mapping
from fnmatch import fnmatchcase

from stack.health.orphan import AGENT_PID
from stack.interpreter import SAFE_PATH
from stack.plan.policies import local_devices
from stack.train.ranks import LAUNCHER
from stack.train.worker import VISIBLE_DEVICES

#: What launchers tell their ranks. Where `stack train` is itself a rank of some launcher, or was started in a shell
#: inside such a job, these are about that launcher's ranks: ours would take them for their own. Slurm's names are those
#: of one task and one step; srun reads those of the allocation, and sets these for each of its tasks.
_OF_A_LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "NODE_RANK", "CROSS_RANK", "CROSS_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
    *("TORCHELASTIC_*", "OMPI_*", "PMI_*", "PMIX_*", "MV2_*", "MPI_LOCALRANKID", "PALS_*"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_*", "SLURM_STEPID", "SLURM_GTIDS"),
    *(LAUNCHER, VISIBLE_DEVICES, AGENT_PID),
)

#: Variables with the settings of torch's allocator on GPUs: the name, and the older one.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def environment_of(host: Mapping[str, str], given: Mapping[str, str], ranks: int) -> dict[str, str]:
    """What the launchers of one host get.

    Args:
        host: the variables of the agent there, which are the host's own.
        given: variables from the driver; they count more.
        ranks: to be started on the host, which share its cores.
    """
    own = {name: value for name, value in host.items() if not is_of_a_launcher(name)}
    environment = {**_defaults(ranks, {**host, **given}), **own, **given, **SAFE_PATH, AGENT_PID: str(os.getpid())}
    if "CUDA_VISIBLE_DEVICES" in host:
        # The launcher numbers the devices from 0 whatever the user had made visible.
        environment[VISIBLE_DEVICES] = host["CUDA_VISIBLE_DEVICES"]
    return environment


def is_of_a_launcher(name: str) -> bool:
    """Whether a variable says which rank a process is, or where ranks meet."""
    return any(fnmatchcase(name, pattern) for pattern in _OF_A_LAUNCHER)


def _defaults(ranks: int, host: Mapping[str, str]) -> dict[str, str]:
    """The cores of the host shared between its ranks, and no GPU where there is none."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    defaults = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if not local_devices():
        return {**defaults, "DS_ACCELERATOR": "cpu"}
    # A rank has several communicators on one GPU; NCCL then starts their kernels in the order of the calls.
    defaults["NCCL_LAUNCH_ORDER_IMPLICIT"] = "1"
    if not any(name in host for name in _ALLOCATOR):
        # Units of very different size are gathered and released in turn, which would fragment fixed segments.
        defaults[_ALLOCATOR[0]] = "expandable_segments:True"
    return defaults
