"""Starts the ranks of this host without a launcher, one process each. A good start for a new backend."""

from stack.interpreter import PYTHON
from stack.launch.order import Command
from stack.launch.place import Place
from stack.train.rundir import RunDir


def commands(place: Place, run: RunDir, node: int) -> list[Command]:
    """One process for each rank, with the variables that launchers set."""
    size = place.hosts[node].slots
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    shared |= {"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}
    argv = [*PYTHON, "-u", "-m", "stack.train", "--config", str(run.config)]
    return [Command(argv, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, rank) for rank in range(size)]
