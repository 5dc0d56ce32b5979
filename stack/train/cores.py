"""Which cores of its host a rank computes on."""

import os

from stack.train.ranks import ranks_here


def own_cores(cores: list[int], rank: int, ranks: int) -> list[int]:
    """A rank's even share of the cores that the ranks of a host may use, neighbours together since they share caches.
    All of them where there are fewer cores than ranks: the scheduler then does better than any fixed choice.

    Args:
        cores: numbers of the cores.
        rank: 0, 1, ... on the host.
        ranks: of the host.
    """
    if len(cores) < ranks:
        return cores
    return cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks]


def bind() -> None:
    """Keeps this process, and the threads it will start, on its share, where its launcher says how many ranks the host
    has."""
    ranks = ranks_here()
    if ranks and "LOCAL_RANK" in os.environ:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, own_cores(cores, int(os.environ["LOCAL_RANK"]), ranks))
