"""The order of starting steps, reading results, and making batches."""

import threading

import pytest

from stack.train.ahead import Prefetch, results


class Step:
    """A step that records when it is started and when its result is read. It is its own result."""

    def __init__(self, number: int, seen: list[str]):
        self.number, self.stop, self._seen = number, False, seen
        seen.append(f"start {number}")

    def result(self, stop: bool) -> "Step":
        self._seen.append(f"result {self.number}")
        self.stop = stop
        return self


def run(*, ahead: bool, settle_after: int | None = None, first: int = 0, asked_at: int | None = None) -> list[str]:
    """The recorded events of steps `first` to 3.

    Args:
        ahead, settle_after: as of `results`.
        first: number of the first step.
        asked_at: number of results after which the end is requested.
    """
    seen: list[str] = []
    for result, last in results(
        lambda step: Step(step, seen),
        range(first, 4),
        ahead=ahead,
        settle_after=lambda step: step == settle_after,
        asked=lambda: sum(line.startswith("row") for line in seen) == asked_at,
    ):
        seen.append(f"row {result.number}")
        if last:
            seen.append("last")
    return seen


def test_without_running_ahead_each_step_ends_before_the_next_starts():
    expected = [f"{what} {step}" for step in range(4) for what in ("start", "result", "row")]
    assert run(ahead=False) == [*expected, "last"]


def test_a_step_is_started_before_the_one_before_it_is_read():
    assert run(ahead=True, first=1) == [
        *("start 1", "start 2", "result 1", "row 1"),
        *("start 3", "result 2", "row 2", "result 3", "row 3", "last"),
    ]


def test_asked_to_end_it_ends_with_the_step_that_is_running():
    assert run(ahead=False, asked_at=1)[-4:] == ["start 1", "result 1", "row 1", "last"]


def test_ahead_it_ends_with_the_step_that_was_started_already():
    # The end is requested when the result of step 1 is read. Step 2 is already on the device, so the run ends with it.
    assert run(ahead=True, asked_at=1)[-5:] == ["result 1", "row 1", "result 2", "row 2", "last"]
    assert "start 3" not in run(ahead=True, asked_at=1)


def test_asked_at_the_very_end_nothing_is_different():
    assert run(ahead=True, asked_at=3) == run(ahead=True)


def test_nothing_is_started_while_a_step_settles():
    seen = run(ahead=True, settle_after=1)
    assert seen.index("row 1") < seen.index("start 2")
    assert [line for line in seen if line.startswith("row")] == ["row 0", "row 1", "row 2", "row 3"]


def test_the_next_batch_is_made_while_this_one_is_used():
    made, second = [], threading.Event()

    def make(step: int) -> int:
        made.append((step, threading.current_thread().name))
        if step == 1:
            second.set()
        return step * 10

    with Prefetch(make, stop=2) as batches:
        assert batches.take(0) == 0
        assert second.wait(5)
        assert batches.take(1) == 10
    assert [step for step, _ in made] == [0, 1]
    assert all(name.startswith("prefetch") for _, name in made)


def test_a_batch_out_of_turn_is_made_anew():
    with Prefetch(lambda step: step, stop=10) as batches:
        assert [batches.take(step) for step in (0, 5, 2)] == [0, 5, 2]


def test_without_prefetch_a_batch_is_made_where_it_is_asked_for():
    with Prefetch(lambda _: threading.current_thread().name, stop=2, ahead=False) as batches:
        assert batches.take(0) == threading.current_thread().name


def test_an_error_of_the_thread_comes_with_the_batch_it_belongs_to():
    def make(step: int) -> int:
        if step == 1:
            raise OSError("the shard is gone")
        return step

    with Prefetch(make, stop=3) as batches:
        assert batches.take(0) == 0
        with pytest.raises(OSError, match="shard is gone"):
            batches.take(1)
