"""Summary figures from the rows of a run."""

import pytest

from stack.observe.course import Course, StageTime
from stack.observe.metrics import StepRecord
from tests.unit.test_observe_metrics import row


def course(*rows: StepRecord, started: float = 0.0) -> Course:
    made = Course(started)
    for each in rows:
        made.add(each)
    return made


def test_no_row_adds_up_to_nothing() -> None:
    assert course().summary() == {}
    assert course().stages() == []


def test_repeated_steps_and_idle_time_are_no_goodput() -> None:
    rows = [
        *(row(step, step_time_s=2.0, time=10.0 + 2 * step, attempt=1) for step in (1, 2, 3, 4)),
        *(row(step, step_time_s=1.0, time=50.0 + step, attempt=2) for step in (3, 4, 5)),
    ]
    # The steps that count are 1 and 2 of the first attempt and 3 to 5 of the second.
    assert course(*rows, started=5.0).summary()["goodput"] == pytest.approx((2 * 2 + 3 * 1) / (55 - 5))


def test_the_best_is_the_best_of_what_was_kept() -> None:
    rows = [row(1, heldout_loss=3.0), row(2, heldout_loss=1.0), row(2, attempt=2, heldout_loss=2.0)]
    assert course(*rows).summary()["best_heldout_loss"] == 2.0
    assert "best_heldout_loss" not in course(row(1)).summary()


def test_figures_of_the_last_row_and_of_all() -> None:
    rows = [row(1, memory_peak_bytes=9), row(2, memory_peak_bytes=7, loss=4.0, tokens_total=32, attempt=3)]
    summary = course(*rows).summary()
    assert {name: summary[name] for name in ("final_loss", "tokens_seen", "peak_memory_bytes", "attempts")} == {
        "final_loss": 4.0,
        "tokens_seen": 32,
        "peak_memory_bytes": 9,
        "attempts": 3,
    }


def test_stages_are_those_of_the_last_attempt() -> None:
    rows = [
        row(1, step_time_s=4.0, stage_busy_s=(4.0, 4.0, 4.0)),
        row(1, step_time_s=4.0, stage_busy_s=(3.0, 1.0), attempt=2),
        row(2, step_time_s=4.0, stage_busy_s=(1.0, 1.0), attempt=2),
    ]
    assert course(*rows).stages() == [StageTime(0, 2.0, 0.5), StageTime(1, 1.0, 0.25)]


def test_busy_seconds_read_back_with_the_same_bits() -> None:
    busy = row(1, stage_busy_s=(0.1 + 0.2, 1 / 3))
    assert StepRecord.from_json(busy.to_json()) == busy
    with pytest.raises(ValueError, match="its stage_busy_s is 3"):
        StepRecord.from_json(row(1).to_json()[:-1] + ', "stage_busy_s": 3}')


def test_an_evaluation_ahead_of_the_first_step_is_a_loss_and_no_step() -> None:
    course = Course(started=1000.0)
    first = StepRecord.before_training(7.5, attempt=1, time=1001.0)
    course.add(first)
    assert course.summary() == {}
    assert not course.stages()
    for step in (1, 2):
        course.add(row(step, stage_busy_s=(1.0, 2.0)))
    assert course.summary()["best_heldout_loss"] == 7.5
    assert course.summary()["final_loss"] == row(2).loss
    assert [line.busy_s for line in course.stages()] == [1.0, 2.0]
