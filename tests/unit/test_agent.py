"""Who is asked to save, on a host whose ranks are there or on others."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from stack.launch.agent import Command, Order, _ask_to_save
from stack.launch.processes import local_ranks
from stack.train import rundir
from stack.train.rundir import RunDir

#: Ends with 10 on SIGUSR1, with 15 on SIGTERM.
ASKED = """
import signal, sys
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: sys.exit(number))
print("ready", flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen]:
    with subprocess.Popen([sys.executable, "-c", ASKED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.fixture
def run(tmp_path) -> RunDir:
    for rank in (0, 1):
        (tmp_path / "ranks" / str(rank)).mkdir(parents=True)
    return RunDir(tmp_path)


def ask(run: RunDir, launcher: subprocess.Popen, asked: set[int]) -> None:
    order = Order(str(run.path), "host", [0, 1], [Command(["srun"], {})], {}, grace_s=1, silence_s=None)
    _ask_to_save(run, order, local_ranks(run, order.ranks, {}), [launcher], asked)


def test_a_rank_of_this_host_is_asked_itself(run, process):
    rundir.write_json(run.rank(0) / "rank.json", {"pid": process.pid, "host": socket.gethostname()})
    rundir.write_json(run.rank(1) / "rank.json", {"pid": 1, "host": "elsewhere"})
    ask(run, process, asked := set())
    assert process.wait(10) == signal.SIGTERM
    assert asked == {0}


def test_ranks_of_other_hosts_are_asked_through_their_launcher(run, process):
    rundir.write_json(run.rank(1) / "rank.json", {"pid": 1, "host": "elsewhere"})
    ask(run, process, asked := set())
    assert process.wait(10) == signal.SIGUSR1
    assert asked == {0, 1}


def test_nobody_is_asked_who_is_not_there_yet(run, process):
    ask(run, process, asked := set())
    assert (process.poll(), asked) == (None, set())
