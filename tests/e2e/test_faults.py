"""When a run ends early, the exit code and FAILED.json say why, and no process is left."""

import re
import shutil
import signal
import time

import pytest

from tests.helpers.runs import STACK

pytestmark = pytest.mark.ci

#: A run that is longer than any test waits.
ENDLESS = {
    "train.steps": 1_000_000,
    "schedule.kind": "constant",
    "train.log_every": 1000,
    "log.wandb.mode": "disabled",
}
OFFLINE = {"log.wandb.mode": "offline"}


@pytest.fixture
def running(start):
    """Starts an endless run of two ranks and waits for its third step."""

    def run(settings=()):
        command = start({**ENDLESS, **dict(settings)})
        command.wait_for_step(3)
        return command

    return run


def assert_failed(command, exit_code, kind, message, *, rank=None):
    assert command.wait(20) == exit_code, command.stdout + command.stderr
    command.assert_nothing_left(within_s=0)
    failure = command.json("FAILED.json")
    assert (failure["type"], failure["exit_code"]) == (kind, exit_code)
    assert message in failure["message"]
    assert rank is None or failure["rank"] == rank
    assert f"{kind}: " in command.stdout
    assert message in command.stdout
    assert "Traceback" not in command.stdout + command.stderr
    assert not (command.run / "DONE.json").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named(running, rank):
    command = running(OFFLINE)
    killed = command.rank(rank)
    killed.kill()

    assert_failed(command, 9, "RankFailure", f"process {killed.pid} was killed or crashed", rank=rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_before_it_says_who_it_is_is_named(start, rank):
    command = start({**ENDLESS, "launch.backend": "local"})

    def ranks():
        found = [p for p in command.processes() if "--config" in p.info["cmdline"]]
        return found if len(found) == 2 else None

    killed = sorted(command.wait_for(ranks, "two ranks"), key=lambda process: process.pid)[rank]
    killed.kill()

    assert_failed(command, 9, "RankFailure", f"process {killed.pid} was killed or crashed", rank=rank)


def test_a_run_directory_that_is_removed_ends_its_ranks(running):
    command = running()
    shutil.rmtree(command.run)

    assert command.wait(20) == 9, command.stdout + command.stderr
    command.assert_nothing_left(within_s=0)
    assert "was removed, so its ranks end too" in command.stdout
    assert "Traceback" not in command.stdout + command.stderr


def test_a_rank_that_raises_is_named(start):
    command = start(ENDLESS)
    command.wait_for((command.run / "ranks/1").is_dir, "the folder of rank 1")
    (command.run / "ranks/1/log.txt").mkdir()  # the rank cannot write its log into a folder

    command.wait()
    assert_failed(command, 9, "IsADirectoryError", "log.txt", rank=1)


def test_a_corpus_that_vanishes_is_a_data_error(start, tiny, tmp_path):
    shutil.copytree(tiny["data.root"], tmp_path / "data")
    command = start({**ENDLESS, "data.root": tmp_path / "data"})
    command.wait_for((command.run / "corpus.json").exists, "corpus.json")
    shutil.rmtree(tmp_path / "data")

    command.wait()
    assert_failed(command, 5, "DataError", "is no prepared corpus")


def test_a_loss_that_is_not_finite_ends_the_run_with_its_curve(start):
    command = start({**ENDLESS, **OFFLINE, "optim.lr": 1e38})

    command.wait()
    assert_failed(command, 7, "NumericsError", "loss is nan at step 2")
    assert len(command.records()) == 1
    assert (command.run / "curve.png").exists()
    assert list(command.run.glob("wandb/offline-run-*"))


def test_a_rank_that_hangs_is_a_hang(running):
    command = running({"health.hang_timeout_s": 10, "launch.grace_s": 1})
    stopped = command.rank(1)
    stopped.suspend()
    command.wait_for(lambda: command.json("FAILED.json"), "FAILED.json")

    assert_failed(command, 8, "HangError", "did not answer within health.hang_timeout_s", rank=1)
    assert f"HangError: rank 1: process {stopped.pid} on " in command.stdout
    assert "is stopped (SIGSTOP, or a debugger), training after step " in command.stdout


def test_ctrl_c_again_and_again_leaves_nothing_behind(running):
    command = running({"launch.grace_s": 2, "checkpoint.every": 2, "checkpoint.async_save": False})
    command.rank(1).suspend()  # a suspended process does not react to SIGTERM; only SIGKILL ends it
    for _ in range(5):
        command.send(signal.SIGINT)
        time.sleep(0.3)

    assert_failed(command, 130, "Interrupted", "stopped by Ctrl-C")
    assert re.search(rf"to go on from step \d+: stack resume {command.run}", command.stdout)


def test_ctrl_c_before_the_ranks_are_up_ends_at_once(start):
    command = start(ENDLESS)
    command.find("deepspeed.launcher.launch")
    command.send(signal.SIGINT)

    assert_failed(command, 130, "Interrupted", "stopped by Ctrl-C")


def test_no_rank_outlives_a_killed_driver(running):
    command = running(OFFLINE)
    command.process.kill()
    command.assert_nothing_left(within_s=10)
    assert "the driver is gone" in command.json("FAILED.json")["message"]


def test_no_rank_outlives_a_driver_that_was_killed_before_it_came_up(start):
    command = start(ENDLESS)
    command.find("deepspeed.launcher.launch")
    command.process.kill()
    command.assert_nothing_left(within_s=30)


@pytest.mark.parametrize(
    ("which", "word"), [("agent", "stack.launch.agent"), ("launcher", "deepspeed.launcher.launch")]
)
def test_a_killed_launcher_is_a_failure_though_deepspeed_may_return_0(running, which, word):
    command = running()
    killed = command.find(word)
    killed.kill()

    assert command.wait(20) == 9, command.stdout + command.stderr
    command.assert_nothing_left(within_s=0)
    failure = command.json("FAILED.json")
    if which == "agent":
        assert failure["message"].startswith("localhost lost its agent (-9)")
    else:
        assert failure["message"] == f"the launcher (process {killed.pid}) was killed, so its ranks end too"


def test_a_run_ends_when_nobody_reads_its_output(start):
    command = start(ENDLESS, ("bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "bash", STACK, "train"))

    assert command.wait() == 128 + signal.SIGPIPE
    command.assert_nothing_left(within_s=0)
    assert command.json("FAILED.json")["message"] == "the reader of the output is gone"
    assert command.stderr == ""
