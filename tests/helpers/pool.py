"""Gloo ranks that are started once for each world size and reused by many test cases.

The imports of a rank take seconds, and a test case takes milliseconds.
"""

import contextlib
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

#: Seconds that a case may take before the pool is killed.
CASE_TIMEOUT_S = 40
_AFTER_FAILURE_S = 2


def free_port() -> int:
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class RankPool:
    """`world_size` processes in one gloo process group."""

    def __init__(self, world_size: int):
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, world_size, port), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = CASE_TIMEOUT_S) -> list[Any]:
        """Calls `function(*args)` on every rank and returns the results by rank.

        Raises:
            AssertionError: a rank raised (its traceback is the message) or did not answer in time.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < len(self._pipes) and (left := deadline - time.monotonic()) > 0:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            for pipe in wait(waiting, timeout=left):
                answers[self._pipes.index(pipe)] = pipe.recv()
            if any(not ok for ok, _ in answers.values()):
                # The other ranks may wait for the failed rank in a collective, so they get a little time to fail too.
                deadline = min(deadline, time.monotonic() + _AFTER_FAILURE_S)
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in sorted(answers.items()) if not ok]
        if failed or len(answers) < len(self._pipes):
            # After a failure the state of the ranks is unknown, so the next case gets a new pool.
            self.close()
            missing = f"ranks that did not answer: {sorted(set(range(len(self._pipes))) - set(answers))}"
            raise AssertionError("\n".join([*failed, missing]))
        return [answers[rank][1] for rank in range(len(self._pipes))]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
    )
    import torch

    from stack.parallel import zero

    torch.set_num_threads(1)
    _share_device()
    zero.init_distributed(timeout=timedelta(seconds=CASE_TIMEOUT_S))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except BaseException:  # noqa: BLE001 - whatever a case raises is reported to the test
            pipe.send((False, traceback.format_exc()))


def _share_device() -> None:
    """Lets all gloo groups of this rank share one device, which has one thread. That thread wakes a hundred times a
    second, and groups outlive their case because DeepSpeed's engines are never freed: with a device of its own for each
    group, the threads of a hundred cases would take half of the machine."""
    from torch.distributed import ProcessGroupGloo, Store, distributed_c10d

    device = ProcessGroupGloo.create_default_device()

    class SharedDevice(ProcessGroupGloo):
        def __init__(self, store: Store, rank: int, size: int, timeout: timedelta):
            options = ProcessGroupGloo._Options()
            options._devices, options._timeout, options._threads = [device], timeout, 2
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = SharedDevice  # type: ignore[misc]
