"""The DeepSpeed launcher on this host. Nothing but a file path crosses to the ranks."""

import os
import sys

from stack.errors import LayoutError
from stack.health.orphan import DRIVER_PID
from stack.plan.layout import Plan
from stack.plan.policies import local_devices
from stack.train.rundir import RunDir
from stack.train.worker import VISIBLE_DEVICES


def check(plan: Plan) -> None:
    """Whether this driver can start the plan.

    Raises:
        LayoutError: the plan spans hosts, which this driver does not start; the launcher itself does.
    """
    if plan.nodes > 1:
        raise LayoutError(
            f"launch.nodes={plan.nodes}: stack train starts this host only; use launch.nodes=1, or on several hosts "
            "deepspeed --hostfile HOSTFILE --no_local_rank --module stack.train OVERRIDES"
        )
    gpus = local_devices()
    if gpus and plan.world_size > gpus:
        raise LayoutError(
            f"launch.ranks_per_node={plan.world_size} is more than the {gpus} GPUs here, and NCCL takes one rank a "
            f"GPU; use launch.ranks_per_node={gpus}"
        )


def command(run: RunDir, plan: Plan, *, port: int) -> list[str]:
    """The launcher's command line; its hostfile is written into the run directory."""
    hostfile = run.path / "hostfile"
    hostfile.write_text(f"localhost slots={plan.world_size}\n")
    return [
        sys.executable,
        *("-m", "deepspeed.launcher.runner"),
        # Given explicitly, or the launcher would take a /job/hostfile that has nothing to do with this run.
        *("--hostfile", str(hostfile)),
        "--no_ssh_check",
        *("--master_addr", "127.0.0.1"),
        *("--master_port", str(port)),
        "--no_local_rank",
        *("--module", "stack.train"),
        *("--config", str(run.config)),
    ]


def environment(plan: Plan) -> dict[str, str]:
    """The ranks' environment: this one's, with the cores shared between the ranks."""
    threads = max(1, len(os.sched_getaffinity(0)) // plan.world_size)
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}
    environment[DRIVER_PID] = str(os.getpid())
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        environment[VISIBLE_DEVICES] = os.environ["CUDA_VISIBLE_DEVICES"]
    if not local_devices():
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
