import pytest

from tests.helpers.forked import Zygote
from tests.helpers.pool import RankPool

_POOLS: dict[int, RankPool] = {}


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n)` returns a pool of n gloo ranks, which all tests of the session share."""

    def get(world_size: int) -> RankPool:
        if world_size not in _POOLS or not _POOLS[world_size].alive:
            _POOLS[world_size] = RankPool(world_size)
        return _POOLS[world_size]

    yield get
    for pool in _POOLS.values():
        pool.close()
    _POOLS.clear()


@pytest.fixture(scope="session")
def _zygotes():
    made: list[Zygote] = []
    yield made
    for zygote in made:
        zygote.close()


@pytest.fixture
def zygote(_zygotes):
    """A process that forks ranks (tests/helpers/forked.py). The session shares one; a dead one is replaced."""
    if not _zygotes or not _zygotes[-1].alive:
        _zygotes.append(Zygote())
    return _zygotes[-1]
