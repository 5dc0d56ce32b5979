"""Starts DeepSpeed's launcher on each host. docs/decisions.md says why DeepSpeed's multi-node runner is not used."""

import base64
import json

from stack.interpreter import PYTHON
from stack.launch.order import Command
from stack.launch.place import Place
from stack.train.rundir import RunDir


def commands(place: Place, run: RunDir, node: int) -> list[Command]:
    """One launcher for all ranks of host number `node`."""
    world = {host.name: list(range(host.slots)) for host in place.hosts}
    argv = [
        *PYTHON,
        *("-u", "-m", "deepspeed.launcher.launch"),
        f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
        f"--node_rank={node}",
        f"--master_addr={place.address}",
        f"--master_port={place.port}",
        "--no_local_rank",
        *("--module", "stack.train"),
        *("--config", str(run.config)),
    ]
    return [Command(argv, {})]
