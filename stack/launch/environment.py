"""The environment of the launchers of a host, and so of the ranks there."""

import os
from collections.abc import Mapping
from fnmatch import fnmatchcase

from stack.health.orphan import AGENT_PID
from stack.interpreter import SAFE_PATH
from stack.plan.policies import local_devices
from stack.train.ranks import LAUNCHER
from stack.train.worker import VISIBLE_DEVICES

#: Variables that launchers set for their ranks, and that are removed here. If `stack train` is itself a rank of some
#: launcher, or was started in a shell inside such a job, the values describe that launcher's ranks. The Slurm names
#: are those of a task and a step, which srun sets anew for each of its tasks. Variables of the Slurm allocation are
#: kept, because srun reads them.
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
    """The environment of the launchers of one host.

    Args:
        host: the variables of the agent on that host.
        given: variables from the driver, which override those of `host`.
        ranks: number of ranks of the host, which share its cores.
    """
    own = {name: value for name, value in host.items() if not is_of_a_launcher(name)}
    environment = {**_defaults(ranks, {**host, **given}), **own, **given, **SAFE_PATH, AGENT_PID: str(os.getpid())}
    if "CUDA_VISIBLE_DEVICES" in host:
        # The launcher overwrites CUDA_VISIBLE_DEVICES with numbers from 0, whatever the user has set.
        environment[VISIBLE_DEVICES] = host["CUDA_VISIBLE_DEVICES"]
    return environment


def is_of_a_launcher(name: str) -> bool:
    """Whether a launcher sets this variable for its ranks."""
    return any(fnmatchcase(name, pattern) for pattern in _OF_A_LAUNCHER)


def _defaults(ranks: int, host: Mapping[str, str]) -> dict[str, str]:
    """Divides the cores of the host among its ranks, and selects the CPU on a host without a GPU.

    Args:
        ranks: number of ranks of the host.
        host: the variables that are set; the allocator's settings are left to the user who has set some.
    """
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
