"""Backends, which start the ranks. A backend is a module with `commands`; a rank is always `python -m stack.train`."""

from collections.abc import Callable

from stack.config.schema import Config
from stack.errors import LayoutError
from stack.launch.backends import deepspeed, local, slurm, torchrun
from stack.launch.order import Command
from stack.launch.place import Place
from stack.plan.layout import Plan
from stack.plan.policies import local_devices
from stack.train.rundir import RunDir

#: By the name in `launch.backend`: a function that returns what the agent of a host starts, given the host's number.
COMMANDS: dict[str, Callable[[Place, RunDir, int], list[Command]]] = {
    "deepspeed": deepspeed.commands,
    "torchrun": torchrun.commands,
    "slurm": slurm.commands,
    "local": local.commands,
}


def check(cfg: Config, plan: Plan) -> None:
    """Checks that the plan can be started from this host.

    Raises:
        LayoutError: the hosts are not known, the backend does not start ranks on other hosts, or this host has too few
            GPUs.
    """
    backend, hostfile = cfg.launch.backend, cfg.launch.hostfile
    if backend == "slurm":
        slurm.check(cfg, plan)
        return
    if plan.nodes > 1 and hostfile is None:
        raise LayoutError(
            f"launch.nodes={plan.nodes}: the names of the hosts are not known; use launch.hostfile=FILE with a line "
            "`NAME slots=RANKS` for each, or launch.backend=slurm inside an allocation"
        )
    if backend == "local" and hostfile is not None:
        raise LayoutError(
            f"launch.backend=local starts ranks on this host only, and launch.hostfile={hostfile} names hosts; use "
            "launch.backend=deepspeed"
        )
    gpus = local_devices()
    if hostfile is None and gpus and plan.world_size > gpus:
        raise LayoutError(
            f"launch.ranks_per_node={plan.world_size} is more than the {gpus} GPUs here, and NCCL takes one rank on "
            f"each; use launch.ranks_per_node={gpus}"
        )
