"""A sweep of real runs is stopped, resumed and repeated."""

import json
import signal
import sys
from pathlib import Path

import pytest

from stack.observe.jsonl import read
from tests.helpers.runs import STACK

SWEEP = (STACK, "train", "-m")
#: Runs are so long that Ctrl-C reaches the sweep before they end.
SETTINGS = {
    "optim.lr": "0.1,0.01",
    "train.steps": 100,
    "train.eval_every": 100,
    "train.eval_sequences": 8,
    "checkpoint.every": 5,
    "hydra.launcher.max_parallel": 2,
}


def rows(folder: Path) -> list[dict]:
    [file] = folder.glob("runs/run/sweeps/*/sweep.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.ci
@pytest.mark.timeout(600)
def test_a_sweep_is_stopped_gone_on_with_and_then_done(start, tmp_path):
    command = start(SETTINGS, SWEEP)
    command.wait_for(lambda: list(tmp_path.rglob("step-*/manifest.json")), "a checkpoint")
    command.send(signal.SIGINT)
    assert command.wait() == 75, command.stdout
    command.assert_nothing_left(within_s=5)
    stopped = {row["job"]: row for row in rows(tmp_path)}
    assert {row["state"] for row in stopped.values()} == {"stopped"}
    kept = {job for job in stopped if list(tmp_path.rglob(f"{job}/**/step-*/manifest.json"))}
    assert kept

    command = start(SETTINGS, SWEEP)
    assert command.wait(300) == 0, command.stdout
    command.assert_nothing_left(within_s=5)
    ended = {row["job"]: row for row in rows(tmp_path)}
    assert {row["state"] for row in ended.values()} == {"done"}
    # The slower job may have had no checkpoint when the sweep was stopped; then it starts again.
    assert {job for job, row in ended.items() if row["how"] == "resumed"} == kept
    assert all(ended[job]["run"] == stopped[job]["run"] for job in kept)
    for job, row in ended.items():
        records = read(Path(row["run"]) / "metrics.jsonl")
        assert records[-1].heldout_loss == row["objective"]
        assert {record.attempt for record in records} == ({1, 2} if job in kept else {1})
    table = [line.split() for line in command.stdout.splitlines() if " done " in line][-2:]
    best = min(ended.values(), key=lambda row: row["objective"])
    assert (table[0][0], table[0][-1]) == (best["job"], best["overrides"][0])

    command = start({**SETTINGS, "optim.lr": "1e-2,1e-1"}, SWEEP)
    assert command.wait() == 0
    assert {row["how"] for row in rows(tmp_path)[-2:]} == {"skipped"}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"runs"}


@pytest.mark.ci
@pytest.mark.timeout(300)
def test_a_sweep_that_is_killed_takes_its_jobs_with_it(start):
    command = start({**SETTINGS, "train.steps": 1_000_000, "schedule.kind": "constant"}, SWEEP)
    command.wait_for(lambda: list(command.folder.rglob("metrics.jsonl")), "a step")
    command.send(signal.SIGKILL)
    command.assert_nothing_left(within_s=30)


def test_several_values_without_m_are_refused(start):
    command = start({"optim.lr": "1,2"}, (sys.executable, "-m", "stack", "train"))
    assert command.wait() == 3
    assert "add -m to stack train" in command.stderr
