"""Measures when a rank computes in a step. Uses host time on a CPU, and CUDA events on a GPU, so that the host does not
wait for the device."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class StepClock:
    """The time marks of one step, made at its beginning. On a GPU, call `wait` before reading seconds."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = self._now()
        self._ended: Any = None
        self._pipeline: tuple[Any, Any] | None = None

    @contextlib.contextmanager
    def pipeline(self) -> Iterator[None]:
        """A context around all forwards and backwards of the step, waiting included."""
        start = self._now()
        yield
        self._pipeline = (start, self._now())

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """A context around the computation of one forward or backward, without receives and sends."""
        start = self._now()
        yield
        self._spans.append((start, self._now()))

    def end(self) -> None:
        """Marks the end of the step."""
        self._ended = self._now()

    def wait(self) -> None:
        """Waits until the device has reached the end of the step."""
        if self._cuda:
            self._ended.synchronize()

    def step_s(self) -> float:
        """Seconds from the construction of the clock to `end`. Call `wait` before."""
        return self._seconds(self._began, self._ended)

    def idle_s(self) -> float:
        """Seconds inside `pipeline` without computation, in which stages waited for their neighbours. Call `wait`
        before."""
        if self._pipeline is None:
            return 0.0
        return max(0.0, self._seconds(*self._pipeline) - self.busy_s())

    def busy_s(self) -> float:
        """Seconds in forwards and backwards. Call `wait` before."""
        return sum(self._seconds(*span) for span in self._spans)

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._cuda else end - start

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
