import pytest

from tests.helpers.pool import RankPool

_POOLS: dict[int, RankPool] = {}


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n)` is a pool of n gloo ranks, shared by the whole session."""

    def get(world_size: int) -> RankPool:
        if world_size not in _POOLS or not _POOLS[world_size].alive:
            _POOLS[world_size] = RankPool(world_size)
        return _POOLS[world_size]

    yield get
    for pool in _POOLS.values():
        pool.close()
    _POOLS.clear()
