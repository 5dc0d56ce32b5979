"""Finds the rank for which the others wait."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from stack.errors import HangError
from stack.launch.verdict import Failure, blamed
from stack.train import rundir
from stack.train.progress import Look, Phase, Progress, absent, look
from stack.train.rundir import RunDir

RANK = """
import os, sys, time
from pathlib import Path
from stack.train import rundir
from stack.train.progress import Phase, Progress
progress = Progress()
progress.at(Phase.TRAINING, 12)
about = {"pid": os.getpid(), "host": os.uname().nodename, "progress": progress.file}
rundir.write_json(Path(sys.argv[1], "rank.json"), about)
print("ready", flush=True)
time.sleep(60)
"""
GAVE_UP = "another rank did not answer within health.hang_timeout_s: gloo/ timed out"
HANG = Failure("HangError", GAVE_UP, HangError.exit_code, rank=1, host="host-a")


def seen(rank: int, step: int, *, stopped: bool = False, host: str = "host-b") -> Look:
    return Look(rank, host, 100 + rank, stopped, step, "training")


@pytest.fixture
def run(tmp_path):
    for rank in range(3):
        (tmp_path / "ranks" / str(rank)).mkdir(parents=True)
    return RunDir(tmp_path)


def test_a_stopped_rank_is_seen_with_how_far_it_is(run):
    here = {"host": socket.gethostname()}
    rundir.write_json(run.rank(1) / "rank.json", {"pid": os.getpid(), "progress": 10_000, **here})
    rundir.write_json(run.rank(2) / "rank.json", {"pid": 1, "progress": 3, "host": "elsewhere"})
    with subprocess.Popen([sys.executable, "-c", RANK, run.rank(0)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        [found] = look(run, range(3))
        assert (found.rank, found.pid, found.stopped, found.step) == (0, process.pid, False, 12)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        # The launcher has asked the rank to end, but a stopped process does not react.
        rundir.write_json(run.rank(0) / "stopped.json", {})
        assert look(run, range(3))[0].stopped
        rundir.write_json(run.rank(0) / "error.json", {})
        assert look(run, range(3)) == []
        process.kill()
    assert look(run, range(3)) == []


def test_to_say_how_far_one_is_costs_nothing():
    progress = Progress()
    began = time.perf_counter()
    for step in range(10_000):
        progress.at(Phase.TRAINING, step)
    assert (time.perf_counter() - began) / 10_000 < 50e-6


@pytest.mark.parametrize(
    ("looks", "ranks"),
    [
        ([], []),
        ([seen(0, 12), seen(3, 12, stopped=True)], [3]),
        ([seen(0, 12), seen(2, 11), seen(3, 11)], [2, 3]),
        ([seen(2, 12)], [2]),
    ],
)
def test_who_is_absent(looks, ranks):
    assert [found.rank for found in absent(looks)] == ranks


def test_a_hang_is_told_by_the_rank_that_the_others_wait_for():
    found = blamed(HANG, [seen(0, 12), seen(3, 12, stopped=True)])
    assert (found.rank, found.host, found.exit_code) == (3, "host-b", 8)
    assert found.message.startswith("process 103 on host-b is stopped")
    assert found.message.endswith(f"training after step 12; rank 1 gave up: {GAVE_UP}")


def test_a_rank_that_computes_for_ever_is_told_with_where_its_stack_is():
    found = blamed(HANG, [seen(2, 12), seen(3, 12)])
    assert found.message.startswith("process 102 on host-b does not answer; its log has its Python stack, training")
    assert "after step 12; the same holds for rank 3 on host-b; rank 1 gave up: " in found.message


def test_a_hang_that_nobody_can_explain_stays_as_it_is():
    assert blamed(HANG, []) == HANG
    cut = Failure("HangError", "rank 2 on host-b is cut off", 8, rank=0)
    assert blamed(cut, [seen(2, 12)]) == cut
