"""Slurm's srun, inside an allocation: it starts one task a rank, on all hosts at once."""

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

#: What a step ends with when a task leaves must wait for the others to leave in their own way, and say why.
_WAIT_S = 120


def check(cfg: Config, plan: Plan) -> None:
    """Whether there is an allocation that the plan fits into.

    Raises:
        LayoutError: there is none, or it has another number of hosts; or a hostfile names some.
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
        raise LayoutError(f"launch.nodes={plan.nodes}: the allocation has {nodes}; use launch.nodes={nodes}")


def commands(place: Place, run: RunDir, node: int) -> list[Command]:
    """One srun for all ranks. Slurm carries this environment to its tasks, `launch.env` or not."""
    here = place.hosts[node]
    argv = [
        "srun",
        f"--nodes={place.nodes}",
        f"--ntasks={here.slots}",
        f"--ntasks-per-node={here.slots // place.nodes}",
        # Ranks are counted host by host, so that a data group stays inside one.
        "--distribution=block",
        # A bad exit must not end the others before they have said why they leave.
        *("--kill-on-bad-exit=0", f"--wait={_WAIT_S}"),
        *place.options,
        *(*PYTHON, "-u", "-m", "stack.train"),
        *("--config", str(run.config)),
    ]
    environment = {LAUNCHER: "slurm", "MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}
    return [Command(argv, environment)]
