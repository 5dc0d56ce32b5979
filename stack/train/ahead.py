"""Work of the host while the device runs a step: makes the next batch, and reads the numbers of the step before."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

T = TypeVar("T")


class Result(Protocol):
    """The result of a step."""

    @property
    def stop(self) -> bool:
        """Whether training must end after this step; the same on every rank."""


R_co = TypeVar("R_co", bound=Result, covariant=True)


class Running(Protocol[R_co]):
    """A step that may still be running; `result` waits for it."""

    def result(self, stop: bool, /) -> R_co: ...


class Prefetch(Generic[T]):
    """Makes the batch of the next step on a thread. A batch is a function of its step, so the thread has no state."""

    def __init__(self, make: Callable[[int], T], *, stop: int, ahead: bool = True):
        """
        Args:
            make: returns the batch of a step.
            stop: the step after the last one.
            ahead: whether to use a thread; with False `take` makes the batch itself.
        """
        self._make, self._stop = make, stop
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") if ahead else None
        self._next: tuple[int, Future[T]] | None = None

    def take(self, step: int) -> T:
        """The batch of `step`. Raises the exception of `make`, if it raised one."""
        if self._pool is None:
            return self._make(step)
        number, future = self._next or (step, self._pool.submit(self._make, step))
        if number != step:
            future = self._pool.submit(self._make, step)
        batch = future.result()
        self._next = (step + 1, self._pool.submit(self._make, step + 1)) if step + 1 < self._stop else None
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def results(
    start: Callable[[int], Running[R_co]],
    steps: range,
    *,
    ahead: bool,
    settle_after: Callable[[int], bool],
    asked: Callable[[], bool],
) -> Iterator[tuple[R_co, bool]]:
    """Runs steps and yields their results in order, each with whether it is the last: the last of `steps`, or the last
    one that was started when a result said stop.

    Args:
        start: queues a step on the device.
        steps: numbers of the steps.
        ahead: start a step before the result of the one before is read, so that the device does not wait for the host.
        settle_after: whether the result of a step must be read before the next step starts.
        asked: whether this process was asked to end the run.
    """
    running: deque[Running[R_co]] = deque()
    stop = False
    for step in steps:
        running.append(start(step))
        end = step == steps[-1]
        beside = 1 if ahead and not end and not settle_after(step) else 0
        while len(running) > (0 if stop else beside):
            result = running.popleft().result(asked())
            stop = stop or result.stop
            yield result, not running and (stop or end)
        if stop:
            return
