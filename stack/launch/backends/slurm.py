"""Starts the ranks with Slurm's srun inside an allocation: one task for each rank, on all hosts at once."""

import os
import shutil

from stack.config.schema import Config
from stack.errors import LayoutError
from stack.interpreter import PYTHON
from stack.launch.order import Command
from stack.launch.place import Place
from stack.plan.layout import Plan
from stack.train.ranks import LAUNCHER
from stack.train.rundir import RunDir

#: Seconds that srun waits, after the first task has ended, before it kills the others: time to save and write errors.
_WAIT_S = 120


def check(cfg: Config, plan: Plan) -> None:
    """Checks that there is an allocation that the plan fits into.

    Raises:
        LayoutError: there is no allocation, it has too few hosts, or a hostfile is given.
    """
    ranks = plan.world_size // plan.nodes
    if cfg.launch.hostfile is not None:
        raise LayoutError(
            f"launch.hostfile={cfg.launch.hostfile}: with launch.backend=slurm the hosts are those of the allocation; "
            "use launch.hostfile=null"
        )
    if "SLURM_JOB_ID" not in os.environ or shutil.which("srun") is None:
        raise LayoutError(
            "launch.backend=slurm: there is no Slurm allocation here (SLURM_JOB_ID and srun); start with "
            f"salloc --nodes={plan.nodes} --ntasks-per-node={ranks} stack train ..., or sbatch "
            "launch/slurm/train.sbatch"
        )
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", plan.nodes))
    if plan.nodes > nodes:
        raise LayoutError(f"launch.nodes={plan.nodes}: the allocation has {nodes} hosts; use launch.nodes={nodes}")


def commands(place: Place, run: RunDir, node: int) -> list[Command]:
    """One srun for all ranks. Slurm passes the whole environment to its tasks, whatever `launch.env` says."""
    here = place.hosts[node]
    argv = [
        "srun",
        f"--nodes={place.nodes}",
        f"--ntasks={here.slots}",
        f"--ntasks-per-node={here.slots // place.nodes}",
        # Ranks are numbered host by host, so that the ranks of a data-parallel group are on one host.
        "--distribution=block",
        # A bad exit code of one rank must not kill the others before they have written their errors.
        *("--kill-on-bad-exit=0", f"--wait={_WAIT_S}"),
        *place.options,
        *(*PYTHON, "-u", "-m", "stack.train"),
        *("--config", str(run.config)),
    ]
    environment = {LAUNCHER: "slurm", "MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}
    return [Command(argv, environment)]
