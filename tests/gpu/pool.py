"""Ranks for the GPU tests: a single rank uses NCCL, several ranks share the GPU and use the staged group."""

import contextlib
import os
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from tests.helpers import pool
from tests.helpers.pool import CASE_TIMEOUT_S, RankPool


class DevicePool(RankPool):
    """A `RankPool` on `device`: `cuda`, or `cpu` to try the tests themselves."""

    def __init__(self, world_size: int, device: str):
        served = pool._serve
        # The base class starts its processes with the function `pool._serve`.
        pool._serve = _serve_cuda if device == "cuda" else _serve_cpu
        try:
            super().__init__(world_size)
        finally:
            pool._serve = served


def _serve_cuda(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    _serve(pipe, rank, world_size, port, {"OMP_NUM_THREADS": "4"})


def _serve_cpu(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    _serve(pipe, rank, world_size, port, {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""})


def _serve(pipe: Connection, rank: int, world_size: int, port: int, environment: dict[str, str]) -> None:
    os.environ.update(
        environment,
        RANK=str(rank),
        # All ranks use the first GPU.
        LOCAL_RANK="0",
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch
    import torch.distributed as dist

    from stack.parallel import zero
    from tests.gpu import staged

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if world_size > 1:
        staged.register()
        if torch.cuda.is_available():
            torch.cuda.set_device(0)
        dist.init_process_group(staged.NAME, timeout=timedelta(seconds=CASE_TIMEOUT_S))
    zero.init_distributed(timeout=timedelta(seconds=CASE_TIMEOUT_S))
    with contextlib.suppress(EOFError):
        while True:
            function, args = pipe.recv()
            pipe.send(_answer(function, args))


def _answer(function: Any, args: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, function(*args)
    except BaseException:  # noqa: BLE001 - whatever a case raises is reported to the test
        return False, traceback.format_exc()
