"""What is done beside a running step, and in which order."""

import threading

import pytest

from stack.train.ahead import Prefetch, results


class Step:
    """A step that says when it was started and when it was asked for its result."""

    def __init__(self, number: int, seen: list[str]):
        self.number, self._seen = number, seen
        seen.append(f"start {number}")

    def result(self) -> int:
        self._seen.append(f"result {self.number}")
        return self.number


def run(*, ahead: bool, settle_after: int | None = None, first: int = 0) -> list[str]:
    seen: list[str] = []
    for number in results(
        lambda step: Step(step, seen), range(first, 4), ahead=ahead, settle_after=lambda step: step == settle_after
    ):
        seen.append(f"row {number}")
    return seen


def test_without_running_ahead_each_step_ends_before_the_next_starts():
    expected = [f"{what} {step}" for step in range(4) for what in ("start", "result", "row")]
    assert run(ahead=False) == expected


def test_a_step_is_started_before_the_one_before_it_is_read():
    assert run(ahead=True, first=1) == [
        *("start 1", "start 2", "result 1", "row 1"),
        *("start 3", "result 2", "row 2", "result 3", "row 3"),
    ]


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
