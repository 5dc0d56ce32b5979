"""Doing the next thing while the device works: the next batch is made, and the last step's numbers are read."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

T = TypeVar("T")


class Result(Protocol):
    """What a step gave."""

    @property
    def stop(self) -> bool:
        """Whether training is to end, and every rank knows it."""


R_co = TypeVar("R_co", bound=Result, covariant=True)


class Running(Protocol[R_co]):
    """A step whose result may not be there yet."""

    def result(self, stop: bool, /) -> R_co: ...


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
    start: Callable[[int], Running[R_co]],
    steps: range,
    *,
    ahead: bool,
    settle_after: Callable[[int], bool],
    asked: Callable[[], bool],
) -> Iterator[tuple[R_co, bool]]:
    """The results of steps in their order, each with whether it is the last one: of `steps`, or because one said stop.

    Args:
        start: hands a step to the device.
        ahead: start a step before the result of the one before it is read, so that the device never waits for the host.
        settle_after: whether a step must be over before the next one starts.
        asked: whether this process was asked to end.
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
