"""Binds a rank to a share of the CPU cores of its host."""

import os

from stack.train.ranks import ranks_here


def own_cores(cores: list[int], rank: int, ranks: int) -> list[int]:
    """A rank's even share of the cores that the ranks of a host may use. The share is contiguous, because neighbouring
    cores share caches. With fewer cores than ranks it is all cores: the scheduler then does better than a fixed choice.

    Args:
        cores: numbers of the cores.
        rank: number of the rank on the host, from 0.
        ranks: number of ranks on the host.
    """
    if len(cores) < ranks:
        return cores
    return cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks]


def bind() -> None:
    """Binds this process, and threads that it starts later, to its share of the cores. Does nothing where the launcher
    does not say how many ranks the host has."""
    ranks = ranks_here()
    if ranks and "LOCAL_RANK" in os.environ:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, own_cores(cores, int(os.environ["LOCAL_RANK"]), ranks))
