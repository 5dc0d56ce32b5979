"""When a rank computed in a step: host time on the CPU, CUDA events on the GPU, so that measuring waits for nothing."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class StepClock:
    """The marks of one step. Reading them waits, on a GPU, until the last one has passed."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = self._now()
        self._ended: Any = None
        self._pipeline: tuple[Any, Any] | None = None

    @contextlib.contextmanager
    def pipeline(self) -> Iterator[None]:
        """Around all forwards and backwards of the step."""
        start = self._now()
        yield
        self._pipeline = (start, self._now())

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Around one forward or backward, without what it waits for."""
        start = self._now()
        yield
        self._spans.append((start, self._now()))

    def end(self) -> None:
        """The step has nothing more to do."""
        self._ended = self._now()

    def wait(self) -> None:
        """Returns when the device has come to the end of the step."""
        if self._cuda:
            self._ended.synchronize()

    def step_s(self) -> float:
        """Seconds from the making of the clock to `end`. Needs `wait`."""
        return self._seconds(self._began, self._ended)

    def idle_s(self) -> float:
        """Seconds in which the stages waited for their neighbours. Needs `wait`."""
        if self._pipeline is None:
            return 0.0
        return max(0.0, self._seconds(*self._pipeline) - self.busy_s())

    def busy_s(self) -> float:
        """Seconds in forwards and backwards. Needs `wait`."""
        return sum(self._seconds(*span) for span in self._spans)

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._cuda else end - start

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
