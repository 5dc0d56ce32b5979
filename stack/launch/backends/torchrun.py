"""Starts PyTorch's torchrun on each host."""

from stack.interpreter import PYTHON
from stack.launch.order import Command
from stack.launch.place import Place
from stack.train.rundir import RunDir


def commands(place: Place, run: RunDir, node: int) -> list[Command]:
    """One torchrun for all ranks of host number `node`."""
    argv = [
        *PYTHON,
        *("-m", "torch.distributed.run"),
        f"--nnodes={len(place.hosts)}",
        f"--node-rank={node}",
        f"--nproc-per-node={place.hosts[node].slots}",
        f"--master-addr={place.address}",
        f"--master-port={place.port}",
        *("--module", "stack.train"),
        *("--config", str(run.config)),
    ]
    return [Command(argv, {})]
