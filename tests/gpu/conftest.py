"""Skips the GPU tests on a host without a GPU. `STACK_TEST_DEVICE=cpu` runs those that can run on a CPU."""

import os
from pathlib import Path

import pytest
import torch

from tests.gpu.pool import DevicePool

DEVICE = os.environ.get("STACK_TEST_DEVICE", "cuda")
_HERE = Path(__file__).parent


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda_only: means nothing on a CPU")


def pytest_collection_modifyitems(items):
    reason = None
    if DEVICE == "cuda" and not torch.cuda.is_available():
        reason = "needs an NVIDIA GPU (torch.cuda.is_available() is false); STACK_TEST_DEVICE=cpu runs what can"
    for item in items:
        if _HERE not in item.path.parents:
            continue
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif DEVICE == "cpu" and item.get_closest_marker("cuda_only"):
            item.add_marker(pytest.mark.skip(reason="measures CUDA itself"))


@pytest.fixture(scope="session")
def device_ranks():
    """`device_ranks(n)` is a pool of n ranks on the device of the session."""
    pools: dict[int, DevicePool] = {}

    def get(world_size: int) -> DevicePool:
        if world_size not in pools or not pools[world_size].alive:
            # Only one pool at a time, because each rank holds a CUDA context.
            for other in pools.values():
                other.close()
            pools.clear()
            pools[world_size] = DevicePool(world_size, DEVICE)
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.close()
