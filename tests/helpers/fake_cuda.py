"""Stands in for CUDA on a machine without a GPU, and records what is asked of it.

torch's own context managers for devices and streams run as they are; only the calls below them are replaced. So a test
sees which device and which stream a thread has at any time, and in which order copies and events come.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch


@dataclass(eq=False)
class FakeStream:
    """A stream of a device; 0 is the device's default stream."""

    device: torch.device
    number: int

    def __repr__(self) -> str:
        return f"{self.device}/{self.number}"


class FakeCuda:
    """What was asked of the devices: `calls` has one tuple for each call, in order."""

    def __init__(self, current: int):
        """
        Args:
            current: number of the device of the thread that makes this.
        """
        self.calls: list[tuple[Any, ...]] = []
        self.contexts: set[int] = {current}
        """Devices on which a context was opened."""
        self._thread = threading.local()
        self._thread.device = current
        self._streams = 0
        self._pinned: set[int] = set()

    @property
    def device(self) -> int:
        """The device of this thread. A new thread has device 0."""
        return getattr(self._thread, "device", 0)

    def set_device(self, index: int) -> None:
        """As cudaSetDevice since CUDA 12: opens a context."""
        self._thread.device = index
        self.contexts.add(index)

    def exchange_device(self, index: int) -> int:
        """As torch._C._cuda_exchangeDevice; -1 changes nothing."""
        before = self.device
        if index >= 0 and index != before:
            self.set_device(index)
        return before

    def maybe_exchange_device(self, index: int) -> int:
        """As torch._C._cuda_maybeExchangeDevice: opens no context."""
        before = self.device
        if index in self.contexts:
            self._thread.device = index
        return before

    def current_stream(self, device: Any = None) -> FakeStream:
        """The stream of this thread on a device, by default on its current one."""
        index = self.device if device is None else torch.device(device).index
        streams = self._thread.__dict__.setdefault("streams", {})
        return streams.setdefault(index, FakeStream(torch.device("cuda", index), 0))

    def set_stream(self, stream: FakeStream) -> None:
        """As torch._C._cuda_setStream: makes the stream's device current too."""
        if stream.device.index != self.device:
            self.set_device(stream.device.index)
        self._thread.__dict__.setdefault("streams", {})[stream.device.index] = stream

    def stream(self, device: Any = None) -> FakeStream:
        """A new stream."""
        self._streams += 1
        return FakeStream(
            torch.device("cuda", self.device if device is None else torch.device(device).index), self._streams
        )

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """As Tensor.pin_memory, without a copy."""
        self._pinned.add(tensor.data_ptr())
        return tensor

    def copy(self, tensor: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        """As Tensor.to, without a copy."""
        pinned = tensor.data_ptr() in self._pinned
        self.calls.append(
            ("copy", str(device), repr(self.current_stream()), "pinned" if pinned else "pageable", non_blocking)
        )
        return tensor


@contextmanager
def fake_cuda(current: int) -> Iterator[FakeCuda]:
    """Replaces what torch.cuda and tensors ask of a device.

    Args:
        current: number of the device of the calling thread.
    """
    cuda = FakeCuda(current)
    move = torch.Tensor.to

    class Event:
        def __init__(self, **_: Any):
            pass

        def record(self, stream: FakeStream | None = None) -> None:
            cuda.calls.append(("record", repr(stream or cuda.current_stream())))

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        return cuda.pin(tensor)

    def to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        device = next((arg for arg in args if isinstance(arg, torch.device)), options.get("device"))
        if device is None or torch.device(device).type != "cuda":
            return move(tensor, *args, **options)
        return cuda.copy(tensor, torch.device(device), bool(options.get("non_blocking")))

    def register(_pointer: int, size: int, _flags: int) -> int:
        cuda.calls.append(("register", size))
        return 0

    def record_stream(tensor: torch.Tensor, stream: FakeStream) -> None:
        cuda.calls.append(("keep", tuple(tensor.shape), repr(stream)))

    def wait_event(stream: FakeStream, _event: Event) -> None:
        cuda.calls.append(("wait", repr(stream)))

    with ExitStack() as patches:
        for target, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "current_device", lambda: cuda.device),
            (torch.cuda, "_exchange_device", cuda.exchange_device),
            (torch.cuda, "_maybe_exchange_device", cuda.maybe_exchange_device),
            (torch.cuda, "current_stream", cuda.current_stream),
            (torch.cuda, "set_stream", cuda.set_stream),
            (torch.cuda, "Stream", cuda.stream),
            (torch.cuda, "Event", Event),
            (torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register)),
            (torch.cuda, "check_error", lambda _code: None),
            (torch.Tensor, "pin_memory", pin_memory),
            (torch.Tensor, "to", to),
            (torch.Tensor, "record_stream", record_stream),
        ):
            patches.enter_context(patch.object(target, name, value))
        patches.enter_context(patch.object(FakeStream, "wait_event", wait_event, create=True))
        yield cuda
