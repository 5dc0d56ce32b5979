"""`stack ls` prints a row for each run, whatever its directory contains."""

import json
import os
import time
from pathlib import Path

import pytest

from stack.config.compose import compose, to_yaml
from stack.errors import UsageError
from stack.launch.listing import listing
from stack.observe.metrics import StepRecord
from stack.train.lock import RunLock

CONFIG = to_yaml(compose(["train.steps=200"]))
NUMBERS = {"grad_norm": 1.0, "lr": 1e-3, "tokens": 10, "tokens_total": 10, "step_time_s": 0.5, "mfu": None}
NUMBERS |= {"bubble_fraction": 0.0, "memory_peak_bytes": 1, "skipped_steps": 0}


def row(step: int, *, heldout_loss: float | None = None, attempt: int = 1) -> str:
    record = StepRecord(
        step=step, loss=5 - step / 100, tokens_per_s=1234.5, attempt=attempt, time=1000.0 + 2 * step,
        heldout_loss=heldout_loss, **NUMBERS
    )  # fmt: skip
    return record.to_json() + "\n"


def make(root: Path, name: str = "a/1", rows: int = 0, *, age_s: float = 60.0) -> Path:
    run = root / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG)
    (run / "env.json").write_text(json.dumps({"time": time.time() - age_s}))
    if rows:
        lines = [row(step, heldout_loss=4.5 if step == 7 else None) for step in range(1, rows + 1)]
        (run / "metrics.jsonl").write_text("".join(lines))
    return run


def cells(root: Path) -> list[list[str]]:
    """The cells of each row below the titles, which are separated by two spaces."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in listing(root).splitlines()[1:]]


def test_a_run_at_work_has_its_pace_and_the_time_left(tmp_path):
    run = make(tmp_path, rows=20)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(row(21)[:30])  # an unfinished row
    with RunLock(run):
        [found] = cells(tmp_path)
    assert found[:6] == ["a/1", "running", "20/200", "4.8000", "4.5000", "1,234"]
    assert found[6:8] == ["6m 00s", "1m 00s"]
    assert found[8].startswith("process ")


def test_the_time_left_is_that_of_this_attempt(tmp_path):
    run = make(tmp_path, rows=20)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(row(11, attempt=2))
    with RunLock(run):
        assert cells(tmp_path)[0][2:6] == ["11/200", "4.8900", "4.5000", "1,234"]


@pytest.mark.parametrize(
    ("file", "told", "state", "why"),
    [
        ("DONE.json", {"step": 200}, "done", None),
        (
            "SAVED.json",
            {"type": "Requeue", "message": "saved on request", "exit_code": 75},
            "saved",
            "saved on request",
        ),
        ("FAILED.json", {"type": "HangError", "message": "a\nb", "exit_code": 8}, "failed", "HangError: a"),
        (None, None, "ended", "it wrote no result: the process was killed, or its host went down"),
    ],
)
def test_how_a_run_ended(tmp_path, file, told, state, why):
    run = make(tmp_path)
    if file:
        (run / file).write_text(json.dumps(told))
    [found] = cells(tmp_path)
    assert found == ["a/1", state, "0/200", "1m 00s", *([why] if why else [])]


@pytest.mark.parametrize("rubbish", [b"\xff\x00 rubbish\n", b"{}\n", b"[" * 100_000 + b"\n", b'{"step": "x"}\n'])
def test_rubbish_is_shown_as_such(tmp_path, rubbish):
    run = make(tmp_path, rows=3)
    for name in ("metrics.jsonl", "env.json", "config.yaml", "FAILED.json", "lock.json"):
        (run / name).write_bytes(rubbish)
    [found] = cells(tmp_path)
    assert found[:4] == ["a/1", "failed", "0/?", "damaged"]
    assert found[-1] == "FAILED.json is damaged"
    with (run / "metrics.jsonl").open("w") as file:
        file.write(rubbish.decode(errors="replace") + row(5))
    assert cells(tmp_path)[0][2:4] == ["5/?", "4.9500"]


def test_pipes_are_not_waited_for(tmp_path):
    run = make(tmp_path)
    for name in ("metrics.jsonl", "env.json", "config.yaml", "FAILED.json", "lock.json"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    assert cells(tmp_path) == [["a/1", "failed", "0/?", "0m 00s", "FAILED.json is damaged"]]


def test_what_is_no_run_is_left_out(tmp_path):
    make(tmp_path, "a/1")
    (make(tmp_path, "doctor/1") / "check.json").write_text("{}")
    (make(tmp_path, "evaluations/1") / "evaluation.json").write_text("{}")
    make(tmp_path, "a/1/evaluations/2")
    make(tmp_path, "a/1/attempts/1")
    make(tmp_path, "a/sweeps/3f/job1/a/1")
    assert [found[0] for found in cells(tmp_path)] == ["a/1"]
    assert [found[0] for found in cells(tmp_path / "a")] == ["1"]
    (tmp_path / "a/sweeps/3f/sweep.jsonl").touch()
    assert [found[0] for found in cells(tmp_path / "a/sweeps/3f")] == ["job1/a/1"]


def test_the_newest_is_the_last(tmp_path):
    make(tmp_path, "b/1", age_s=10)
    make(tmp_path, "a/2", age_s=100)
    make(tmp_path, "c/1", age_s=50)
    assert [found[0] for found in cells(tmp_path)] == ["a/2", "c/1", "b/1"]


def test_hundreds_of_long_runs_take_no_time(tmp_path):
    rows = "".join(row(step) for step in range(1, 5001))
    for number in range(300):
        run = make(tmp_path, f"a/{number}")
        (run / "metrics.jsonl").write_text(rows)
    began = time.process_time()
    assert len(cells(tmp_path)) == 300
    assert time.process_time() - began < 3


def test_a_folder_without_runs(tmp_path):
    assert listing(tmp_path) == f"no runs in {tmp_path}"
    with pytest.raises(UsageError, match="is no folder"):
        listing(tmp_path / "none")


def test_a_name_that_no_folder_can_have_is_no_folder():
    with pytest.raises(UsageError, match="is no folder"):
        listing(Path("n" * 300))
