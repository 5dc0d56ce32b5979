"""Reads this process's rank from the environment that its launcher set."""

import os
from dataclasses import dataclass

from stack.errors import UsageError

#: Set to "slurm" by the Slurm backend, because srun does not set torch's variables.
LAUNCHER = "STACK_LAUNCHER"
#: torch's variable -> Slurm's variable of a job step.
_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}


#: Variables with the number of a rank's host, of the DeepSpeed launcher, torchrun and Slurm.
_HOST = ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID")


@dataclass(frozen=True, kw_only=True)
class Launched:
    """The place of a rank, as its launcher set it. A process without a launcher is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    hosts: int = 1
    """Number of hosts."""
    local_rank: int = 0
    """Number of the rank on its host, from 0. After `zero.init_distributed` the variable LOCAL_RANK is the number of
    the rank's device instead. That number is 0 for all ranks of a host where each rank sees only one GPU."""
    host: int = 0
    """Number of the rank's host, from 0; 0 where the launcher does not set it."""


def from_environment() -> Launched:
    """This rank's place. Must be called before `zero.init_distributed`. Under Slurm, sets torch's variables from
    Slurm's.

    Raises:
        UsageError: variables are missing or contradict each other.
    """
    if os.environ.get(LAUNCHER) == "slurm":
        missing = [name for name in _SLURM.values() if name not in os.environ]
        if missing:
            raise UsageError(f"{LAUNCHER}=slurm, but {missing[0]} is not set; start the ranks with srun")
        os.environ.update({name: os.environ[slurm] for name, slurm in _SLURM.items()})
        hosts = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
        os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // hosts)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    here = ranks_here() or world_size
    name = "LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    if not 0 <= rank < world_size or world_size % here:
        raise UsageError(
            f"RANK={rank}, WORLD_SIZE={world_size}, {name}={here} (ranks on this host): these do not fit together; "
            "start the ranks with one launcher, the same number on every host, and unset variables of an outer launcher"
        )
    host = next((int(os.environ[name]) for name in _HOST if name in os.environ), 0)
    return Launched(rank=rank, world_size=world_size, hosts=world_size // here, local_rank=local_rank(), host=host)


def local_rank() -> int:
    """The same as `Launched.local_rank`. Must be called before `zero.init_distributed`."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_here() -> int | None:
    """Number of ranks on this host, from the variable of torchrun or of the DeepSpeed launcher; None without either."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(told) if told else None
