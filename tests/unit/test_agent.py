"""The agent of a host: its reports on ranks, its requests to save, and the environment of the ranks."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import disk
from stack.launch import environment
from stack.launch import watch as watching
from stack.launch.environment import environment_of
from stack.launch.order import Command, Order
from stack.launch.watch import Watch
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


def is_rank(run: RunDir, rank: int, pid: int, host: str = "") -> None:
    rundir.write_json(run.rank(rank) / "rank.json", {"pid": pid, "host": host or socket.gethostname(), "progress": 0})


def watch_over(run: RunDir, launcher: subprocess.Popen) -> Watch:
    return Watch(run, Order(str(run.path), "host", [0, 1], [Command(["srun"], {})], {}, 1, None), [launcher])


def asked(run: RunDir, launcher: subprocess.Popen) -> None:
    watch = watch_over(run, launcher)
    watch.report()
    watch.ask_to_save()
    watch.ask_to_save()


def test_a_rank_of_this_host_is_asked_itself(run, process):
    is_rank(run, 0, process.pid)
    is_rank(run, 1, 1, host="elsewhere")
    asked(run, process)
    assert process.wait(10) == signal.SIGTERM


def test_ranks_of_other_hosts_are_asked_through_their_launcher(run, process):
    is_rank(run, 1, 1, host="elsewhere")
    asked(run, process)
    assert process.wait(10) == signal.SIGUSR1


def test_nobody_is_asked_who_is_not_there_yet(run, process):
    asked(run, process)
    assert process.poll() is None


def test_a_rank_that_died_is_seen_at_once(run, process):
    is_rank(run, 0, process.pid)
    launcher = subprocess.Popen(["sleep", "60"])
    try:
        watch = watch_over(run, launcher)
        assert watch.report().ranks == []
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        [ended] = watch.report().ranks
    finally:
        launcher.kill()
        launcher.wait()
    assert (ended.rank, ended.pid, ended.outcome) == (0, process.pid, None)


def test_files_of_ranks_that_live_are_looked_at_seldom(run, process, monkeypatch):
    is_rank(run, 0, process.pid)
    is_rank(run, 1, process.pid)
    watch = watch_over(run, process)
    looks = []
    exists, read = Path.exists, disk.read_regular
    monkeypatch.setattr(Path, "exists", lambda path: looks.append(path) or exists(path))
    monkeypatch.setattr(disk, "read_regular", lambda path: looks.append(path) or read(path))
    for _ in range(10):
        assert watch.report().ranks == []
    # For each of the two ranks one look at its identity and one at its failure.
    assert len(looks) == 4, looks


def test_an_error_of_a_rank_that_does_not_end_is_seen(run, process, monkeypatch):
    monkeypatch.setattr(watching, "_FILES_S", 0.0)
    is_rank(run, 0, process.pid)
    watch = watch_over(run, process)
    assert watch.report().ranks == []
    told = {"rank": 0, "type": "ValueError", "message": "bad", "exit_code": 9, "time": 1.0}
    rundir.write_json(run.rank(0) / "error.json", told)
    assert [(ended.rank, ended.error) for ended in watch.report().ranks] == [(0, told)]


def test_ranks_inherit_nothing_of_an_outer_launcher():
    outer = {"LOCAL_WORLD_SIZE": "3", "RANK": "7", "WORLD_SIZE": "8", "LOCAL_SIZE": "8", "MASTER_ADDR": "elsewhere"}
    outer |= {"TORCHELASTIC_RUN_ID": "x", "OMPI_COMM_WORLD_RANK": "7", "PMI_RANK": "7", "SLURM_PROCID": "7"}
    outer |= {"STACK_LAUNCHER": "slurm", "STACK_AGENT_PID": "1", "STACK_VISIBLE_DEVICES": "5", "GROUP_RANK": "1"}
    kept = {"HOME": "/root", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a", "PYTHONPATH": "/x", "OMP_NUM_THREADS": "2"}
    found = environment_of({**outer, **kept}, {"NCCL_DEBUG": "INFO"}, ranks=2)
    assert {name: found[name] for name in outer if name in found} == {"STACK_AGENT_PID": str(os.getpid())}
    assert {name: found[name] for name in kept} == kept
    assert (found["NCCL_DEBUG"], found["PYTHONSAFEPATH"]) == ("INFO", "1")
    assert environment_of({"CUDA_VISIBLE_DEVICES": "2,3"}, {}, 2)["STACK_VISIBLE_DEVICES"] == "2,3"


def test_ranks_with_gpus_get_settings_of_the_allocator_unless_the_user_has_some(monkeypatch):
    monkeypatch.setattr(environment, "local_devices", lambda: 2)
    found = environment_of({}, {}, 2)
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert found["NCCL_LAUNCH_ORDER_IMPLICIT"] == "1"
    assert "DS_ACCELERATOR" not in found
    for host, given in (({"PYTORCH_CUDA_ALLOC_CONF": "x"}, {}), ({}, {"PYTORCH_ALLOC_CONF": "x"})):
        found = environment_of(host, given, 2)
        assert [value for name, value in found.items() if name.startswith("PYTORCH_")] == ["x"]
