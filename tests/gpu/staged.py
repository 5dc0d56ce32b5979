"""A process group for several ranks on one GPU. NCCL refuses that, so each tensor is copied to the host for gloo.

`stack` itself needs no change: the tests make this the default group before `zero.init_distributed`, which keeps an
existing group. On a CPU the group makes the same copies, so that it is tested without a GPU.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

NAME = "staged"


def register() -> None:
    """Registers the backend `staged` with torch in this process."""
    if not hasattr(dist.Backend, NAME.upper()):
        dist.Backend.register_backend(NAME, _make, devices=["cpu", "cuda"])


def _make(store: dist.Store, rank: int, size: int, timeout: timedelta) -> "StagedGroup":
    return StagedGroup(store, rank, size, timeout)


class _Done(dist._Work):
    """A transfer. `wait` calls `finish`, which for a receive copies the received data into the tensor."""

    def __init__(self, finish: Any = None):
        super().__init__()
        self._finish = finish

    def wait(self, *_: Any) -> bool:
        if self._finish is not None:
            self._finish()
            self._finish = None
        return True

    def is_completed(self) -> bool:
        return self._finish is None

    def get_future(self) -> Any:
        self.wait()
        future: Future[None] = Future()
        future.set_result(None)
        return future


class StagedGroup(dist.ProcessGroup):
    """Each collective copies its inputs to the host, runs there with gloo, waits, and copies the outputs back."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._rank, self._size = rank, size

    def getBackendName(self) -> str:
        return NAME

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def _in_place(self, name: str, tensors: list[torch.Tensor], *given: Any) -> _Done:
        hosts = [tensor.detach().cpu() for tensor in tensors]
        getattr(self._gloo, name)(hosts, *given).wait()
        for tensor, host in zip(tensors, hosts, strict=True):
            tensor.detach().copy_(host)
        return _Done()

    def _out_of_place(self, name: str, output: torch.Tensor, given: torch.Tensor, *options: Any) -> _Done:
        host = torch.empty_like(output, device="cpu")
        getattr(self._gloo, name)(host, given.detach().cpu(), *options).wait()
        output.detach().copy_(host)
        return _Done()

    def allreduce(self, tensors: list[torch.Tensor], *options: Any) -> _Done:
        return self._in_place("allreduce", tensors, *options)

    def broadcast(self, tensors: list[torch.Tensor], *options: Any) -> _Done:
        return self._in_place("broadcast", tensors, *options)

    def reduce(self, tensors: list[torch.Tensor], *options: Any) -> _Done:
        return self._in_place("reduce", tensors, *options)

    def _allgather_base(self, output: torch.Tensor, given: torch.Tensor, *options: Any) -> _Done:
        return self._out_of_place("_allgather_base", output, given, *options)

    def _reduce_scatter_base(self, output: torch.Tensor, given: torch.Tensor, *options: Any) -> _Done:
        return self._out_of_place("_reduce_scatter_base", output, given, *options)

    def allgather(self, outputs: list[list[torch.Tensor]], given: list[torch.Tensor], *options: Any) -> _Done:
        hosts = [[torch.empty_like(tensor, device="cpu") for tensor in row] for row in outputs]
        self._gloo.allgather(hosts, [tensor.detach().cpu() for tensor in given], *options).wait()
        for row, host_row in zip(outputs, hosts, strict=True):
            for tensor, host in zip(row, host_row, strict=True):
                tensor.copy_(host)
        return _Done()

    def reduce_scatter(self, outputs: list[torch.Tensor], given: list[list[torch.Tensor]], *options: Any) -> _Done:
        hosts = [torch.empty_like(tensor, device="cpu") for tensor in outputs]
        self._gloo.reduce_scatter(hosts, [[tensor.cpu() for tensor in row] for row in given], *options).wait()
        for tensor, host in zip(outputs, hosts, strict=True):
            tensor.copy_(host)
        return _Done()

    def allgather_into_tensor_coalesced(self, outputs: list[torch.Tensor], given: list[torch.Tensor], *_: Any) -> _Done:
        for output, tensor in zip(outputs, given, strict=True):
            self._allgather_base(output, tensor)
        return _Done()

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[torch.Tensor], given: list[torch.Tensor], *options: Any
    ) -> _Done:
        for output, tensor in zip(outputs, given, strict=True):
            self._reduce_scatter_base(output, tensor, *options)
        return _Done()

    # The names of these collectives in torch 2.13.
    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    def barrier(self, opts: Any = None) -> _Done:  # noqa: ARG002 - it may name devices that gloo does not have
        self._gloo.barrier().wait()
        return _Done()

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> _Done:
        hosts = [tensor.detach().cpu().contiguous() for tensor in tensors]
        work = self._gloo.send(hosts, to, tag)
        # The copies are kept until the send is done.
        return _Done(lambda: (work.wait(), hosts.clear()))

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> _Done:
        hosts = [torch.empty_like(tensor, device="cpu") for tensor in tensors]
        work = self._gloo.recv(hosts, source, tag)

        def arrive() -> None:
            work.wait()
            for tensor, host in zip(tensors, hosts, strict=True):
                tensor.detach().copy_(host)

        return _Done(arrive)
