"""A run that is asked to end saves first, ends with exit code 75, and can be resumed from that step."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stack.checkpoint import manifest
from stack.observe.jsonl import read
from tests.e2e.conftest import as_overrides
from tests.e2e.test_faults import ENDLESS, assert_failed
from tests.helpers.pool import free_port
from tests.helpers.runs import DEEPSPEED, STACK, Command

SBATCH = Path(__file__).parents[2] / "launch" / "slurm" / "train.sbatch"
#: Checkpoints are so rare that only a request to end saves one.
SELDOM = {**ENDLESS, "checkpoint.every": 1_000_000}
#: A stand-in for srun with the features that the script uses: it starts tasks on one host, passes signals on, and ends
#: with the highest exit code.
SRUN = """#!{python}
import itertools, os, signal, subprocess, sys
options = list(itertools.takewhile(lambda word: word.startswith("--"), sys.argv[1:]))
command = sys.argv[1 + len(options):]
names = lambda rank: {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}}
tasks = [subprocess.Popen(command, env={{**os.environ, **names(rank)}}) for rank in range(2)]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""


def assert_saved(command, run, *, last_s=30):
    """Checks that the command ended after a save, and that the last row is of the saved step; returns the step."""
    assert command.wait(last_s) == 75, command.stdout + command.stderr
    command.assert_nothing_left(within_s=1)
    return step_saved(run)


def step_saved(run):
    [step] = manifest.steps(run / "checkpoints")
    assert read(run / "metrics.jsonl")[-1].step == step
    assert f"saved on request after step {step} of 1000000" in (run / "SAVED.json").read_text()
    assert not (run / "DONE.json").exists()
    assert not (run / "FAILED.json").exists()
    return step


@pytest.fixture
def running(start):
    def run(settings=(), command=(STACK, "train")):
        started = start({**SELDOM, **dict(settings)}, command)
        started.wait_for_step(3)
        return started

    return run


def test_a_run_that_is_asked_to_end_goes_on_where_it_was(running, start):
    command = running({"log.wandb.mode": "offline"})
    command.send(signal.SIGINT)

    step = assert_saved(command, command.run)
    assert "Ctrl-C: the run is saved after this step, and ends; a second Ctrl-C ends the run at once" in command.stdout
    assert f"saved on request after step {step} of 1000000; to go on: stack resume {command.run}" in command.stdout
    assert (command.run / "curve.png").exists()
    assert list(command.run.glob("wandb/offline-run-*"))

    again = start({"train.steps": step + 2}, (STACK, "resume", str(command.run)))
    assert again.wait() == 0, again.stdout + again.stderr
    assert [row.step for row in command.records()][-3:] == [step, step + 1, step + 2]
    assert not (command.run / "SAVED.json").exists()


def test_a_run_is_stopped_from_another_shell(running):
    command = running()
    assert f"process {command.process.pid} on " in command.stdout
    [line] = [line for line in command.stdout.splitlines() if "stop the run with: " in line]
    stopped = subprocess.run(
        [STACK, *shlex.split(line.partition("stop the run with: stack ")[2])],
        check=True,
        capture_output=True,
        text=True,
    )

    step = assert_saved(command, command.run)
    assert f"saved: saved on request after step {step} of 1000000" in stopped.stdout
    assert "stack stop: the run is saved after this step" in command.stdout
    assert not (command.run / "stop.json").exists()
    listed = subprocess.run([STACK, "ls", command.run.parents[1]], check=True, capture_output=True, text=True)
    assert re.search(rf"{command.run.name} +saved +{step}/1000000 ", listed.stdout), listed.stdout


@pytest.mark.ci
def test_one_rank_that_is_asked_is_enough(running):
    command = running()
    command.rank(1).terminate()
    assert_saved(command, command.run)


@pytest.mark.ci
def test_a_second_request_ends_a_run_that_cannot_save(running):
    command = running({"launch.grace_s": 1})
    command.rank(1).suspend()
    command.send(signal.SIGTERM)
    command.wait_for(lambda: "the run is saved after this step" in command.stdout, "the announcement")
    command.send(signal.SIGTERM)
    assert_failed(command, 143, "Interrupted", "stopped by SIGTERM")


@pytest.mark.ci
def test_without_checkpoints_it_ends_at_once(running):
    command = running({"checkpoint.every": 0})
    command.send(signal.SIGINT)
    assert_failed(command, 130, "Interrupted", "stopped by Ctrl-C")


@pytest.mark.ci
def test_before_the_first_step_there_is_nothing_to_save(start):
    command = start(SELDOM)
    command.rank(0)
    command.send(signal.SIGTERM)
    assert_failed(command, 143, "Interrupted", "stopped by SIGTERM")


@pytest.mark.ci
def test_ranks_without_a_driver_save_too(running, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    master = ("--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    bare = ("--hostfile", str(hostfile), "--no_ssh_check", *master, "--no_local_rank", "--module", "stack.train")
    command = running(command=(DEEPSPEED, *bare))
    # SIGTERM goes to the launcher of the host, which passes it on to the ranks, as when the host is shut down.
    command.find("deepspeed.launcher.launch").terminate()

    command.wait(30)
    command.assert_nothing_left(within_s=1)
    step_saved(command.run)


@pytest.mark.ci
def test_a_job_of_slurm_is_requeued_and_goes_on(tiny, tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    told = tmp_path / "scontrol.txt"
    scontrol = f'#!/bin/sh\necho "$@" >> {told}\n[ "$1" = show ] && echo localhost\nexit 0\n'
    for name, text in {"srun": SRUN.format(python=sys.executable), "scontrol": scontrol}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    sizes = {"SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    for name, value in {**sizes, "SLURM_JOB_NODELIST": "localhost"}.items():
        monkeypatch.setenv(name, value)
    script = ["bash", str(SBATCH), str(tmp_path / "runs")]

    job = Command([*script, *as_overrides({**tiny, **SELDOM})], tmp_path)
    job.wait_for_step(3)
    # Before a time limit Slurm sends the signal to the tasks, not to the script.
    for rank in (0, 1):
        job.rank(rank).terminate()
    step = assert_saved(job, job.run)
    assert "requeue 4711" in told.read_text()

    again = Command(script, tmp_path)
    again.wait_for(lambda: len(read(job.run / "metrics.jsonl")) > step + 1, "a step of the second start")
    again.rank(0).terminate()
    assert again.wait(30) == 75, again.stdout + again.stderr
    rows = [row.step for row in read(job.run / "metrics.jsonl")]
    assert rows == list(range(1, len(rows) + 1))
