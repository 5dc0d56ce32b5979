"""Which rank this process is, from the environment that its launcher gave it."""

import os

from stack.errors import UsageError

#: Set by the Slurm backend: srun gives ranks no names of torch's.
LAUNCHER = "STACK_LAUNCHER"
#: torch's name -> Slurm's, of one step.
_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}


def from_environment() -> tuple[int, int, int]:
    """Rank, world size and number of hosts; a process alone is rank 0 of 1. Slurm's names become torch's.

    Raises:
        UsageError: the environment contradicts itself.
    """
    if os.environ.get(LAUNCHER) == "slurm":
        missing = [name for name in _SLURM.values() if name not in os.environ]
        if missing:
            raise UsageError(f"{LAUNCHER}=slurm, and {missing[0]} is not set; start the ranks with srun")
        os.environ.update({name: os.environ[slurm] for name, slurm in _SLURM.items()})
        hosts = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
        os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // hosts)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    here = ranks_here() or world_size
    name = "LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    if not 0 <= rank < world_size or world_size % here:
        raise UsageError(
            f"RANK={rank}, WORLD_SIZE={world_size}, {name}={here} (ranks on this host): these do not fit together; "
            "start the ranks with one launcher, the same number on every host, and unset what an outer one has left"
        )
    return rank, world_size, world_size // here


def ranks_here() -> int | None:
    """Ranks of this host, where the launcher says it: torchrun's name, and the DeepSpeed launcher's."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(told) if told else None
