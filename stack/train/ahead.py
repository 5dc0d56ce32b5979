"""Doing the next thing while the device works: the next batch is made, and the last step's numbers are read."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True)


class Running(Protocol[R_co]):
    """A step whose result may not be there yet."""

    def result(self) -> R_co: ...


class Prefetch(Generic[T]):
    """Makes the batch of the next step on a thread. A batch is a function of its step, so there is no state to lose."""

    def __init__(self, make: Callable[[int], T], *, stop: int, ahead: bool = True):
        """
        Args:
            make: the batch of a step.
            stop: the step after the last one.
            ahead: False makes each batch when it is asked for.
        """
        self._make, self._stop = make, stop
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") if ahead else None
        self._next: tuple[int, Future[T]] | None = None

    def take(self, step: int) -> T:
        """The batch of `step`; raises what making it raised."""
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
    start: Callable[[int], Running[R_co]], steps: range, *, ahead: bool, settle_after: Callable[[int], bool]
) -> Iterator[R_co]:
    """The results of steps in their order.

    Args:
        start: hands a step to the device.
        ahead: start a step before the result of the one before it is read, so that the device never waits for the host.
        settle_after: whether a step must be over before the next one starts.
    """
    running: Running[R_co] | None = None
    for step in steps:
        following = start(step)
        if running is not None:
            yield running.result()
        running = following
        if not ahead or settle_after(step):
            yield running.result()
            running = None
    if running is not None:
        yield running.result()
