"""Every backend gives the same run. Slurm's backend is tested with stand-ins for srun and scontrol.

The commands run in a folder that has modules with the names of packages that stack imports, with the variables of an
outer launcher set, and with an output that can only encode ASCII.
"""

import os
import sys

import pytest

from tests.helpers.tiers import in_ci_unless

#: A stand-in for srun. It gives each task an environment of its own, passes signals on, and ends with the highest exit
#: code.
SRUN = """#!{python}
import itertools, os, signal, subprocess, sys
options = list(itertools.takewhile(lambda word: word.startswith("--"), sys.argv[1:]))
command = sys.argv[1 + len(options):]
given = dict(option[2:].split("=", 1) for option in options)
size, nodes = int(given["ntasks"]), int(given["nodes"])
assert int(given["ntasks-per-node"]) * nodes == size, options
names = lambda rank: {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % (size // nodes)),
    "SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_NUM_NODES": str(nodes)}}
tasks = [subprocess.Popen(command, env={{**os.environ, **names(rank)}}) for rank in range(size)]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm allocation of two hosts, both of which are this host."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN.format(python=sys.executable), "scontrol": "#!/bin/sh\necho localhost\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost")


OUTER = {"LOCAL_WORLD_SIZE": "3", "LOCAL_SIZE": "3", "RANK": "7", "WORLD_SIZE": "9", "MASTER_ADDR": "192.0.2.9"}


@pytest.fixture(scope="module", autouse=True)
def hostile(tmp_path_factory):
    """The folder and the environment in which the commands of this file run."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "stack").mkdir()
    for name in ("psutil", "deepspeed", "torch", "transformers"):
        (folder / f"{name}.py").write_text("raise ImportError('a module of the current folder was imported')")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for name, value in {**OUTER, "PYTHONIOENCODING": "ascii"}.items():
            patched.setenv(name, value)
        yield


def curve(command):
    assert command.wait() == 0, command.stdout + command.stderr
    command.assert_nothing_left(within_s=1)
    assert command.json("DONE.json")["step"] == 5
    return [(row.loss.hex(), row.grad_norm.hex()) for row in command.records()]


@pytest.fixture(scope="module")
def by_deepspeed(start_in, tmp_path_factory):
    return curve(start_in(tmp_path_factory.mktemp("deepspeed"), {"run.name": '"\u00e9"', "log.wandb.mode": "offline"}))


@pytest.mark.parametrize("backend", in_ci_unless(lambda backend: backend == "local", ["local", "torchrun"]))
def test_a_backend_of_this_host_gives_the_same_run(start, by_deepspeed, backend):
    assert curve(start({"launch.backend": backend})) == by_deepspeed


@pytest.mark.ci
@pytest.mark.usefixtures("slurm")
def test_slurm_gives_the_same_run(start, by_deepspeed):
    run = start({"launch.backend": "slurm", "launch.ranks_per_node": 1})
    assert curve(run) == by_deepspeed
    assert "2 ranks with srun on 2 hosts" in run.stdout


@pytest.mark.ci
@pytest.mark.usefixtures("slurm")
def test_a_killed_task_of_slurm_is_named(start):
    endless = {"train.steps": 1_000_000, "schedule.kind": "constant", "train.log_every": 1000}
    run = start({**endless, "launch.backend": "slurm", "launch.ranks_per_node": 1})
    run.wait_for_step(3)
    killed = run.rank(1)
    killed.kill()

    assert run.wait(30) == 9, run.stdout + run.stderr
    run.assert_nothing_left(within_s=1)
    assert run.json("FAILED.json")["rank"] == 1
