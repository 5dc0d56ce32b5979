"""Tests of tests/helpers/forked.py: runs and functions on forked ranks, which may be killed."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from stack.health.orphan import AGENT_PID
from stack.observe.jsonl import read
from stack.train.lock import RunLock
from stack.train.rundir import RunDir, read_json
from tests.helpers.forked import Killed, tiny_again, tiny_run, tiny_settings

ENDLESS = {"train.steps": 1_000_000, "schedule.kind": "constant", "checkpoint.every": 0}


@pytest.fixture(autouse=True)
def _nothing_left(zygote):
    yield
    assert zygote.alive
    assert psutil.Process(zygote.pid).children(recursive=True) == []


def wait_for(probe: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (found := probe()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_a_run_ends_well_and_goes_on(zygote, tmp_path):
    run = tiny_run(tmp_path)
    seconds = []
    for steps in (5, 8):
        began = time.monotonic()
        assert zygote.run(["--config", str(run.config)], 2) == [0, 0]
        seconds.append(round(time.monotonic() - began, 2))
        assert read_json(run.done)["step"] == steps
        assert len(read(run.metrics)) == steps
        tiny_again(run, {"train.steps": 8})
    print(f"\na run of two forked ranks: {seconds} s")


def bare(zygote, tmp_path, **settings: object) -> tuple[list[int], RunDir | None]:
    """Runs ranks without a driver; returns their exit codes, and their run directory if they made one."""
    tiny_run(tmp_path)  # prepares the corpus
    overrides = {**tiny_settings(), "run.root": tmp_path / "bare", **settings}
    codes = zygote.run([f"{key}={value}" for key, value in overrides.items()], 2, env={AGENT_PID: None})
    return codes, next(map(RunDir, tmp_path.glob("bare/*/*")), None)


def test_ranks_without_a_driver_make_their_run_and_give_it_back(zygote, tmp_path):
    codes, run = bare(zygote, tmp_path)
    assert codes == [0, 0]
    assert run.done.exists()
    assert not (run.path / "lock.json").exists()


def test_ranks_without_a_driver_give_their_run_back_after_a_failure_too(zygote, tmp_path):
    codes, run = bare(zygote, tmp_path, **{"optim.lr": 1e38})
    assert codes == [7, 7]
    assert read_json(run.failed)["exit_code"] == 7
    assert not (run.path / "lock.json").exists()


def test_ranks_without_a_driver_refuse_a_place_for_checkpoints_before_there_is_a_run(zygote, tmp_path, capfd):
    codes, run = bare(zygote, tmp_path, **{"checkpoint.path": "/dev/null/x"})
    assert codes[0] == 3
    assert run is None
    assert "ConfigError: checkpoint.path=/dev/null/x cannot be written" in capfd.readouterr().out


def test_a_run_that_is_in_use_is_left_as_it_is(zygote, tmp_path):
    run = tiny_run(tmp_path)
    before = sorted(path for path in run.path.rglob("*"))
    with RunLock(run.path):
        codes = zygote.run(["--config", str(run.config)], 2, env={AGENT_PID: None})
    assert codes[0] == 2
    assert sorted(path for path in run.path.rglob("*") if path.name != ".lock") == before


def test_ranks_without_a_driver_all_learn_that_there_is_no_corpus(zygote, tmp_path, capfd):
    settings = {**tiny_settings(), "run.root": tmp_path / "bare", "data.root": tmp_path / "none"}
    assert zygote.run([f"{key}={value}" for key, value in settings.items()], 2, env={AGENT_PID: None}) == [5, 5]
    assert capfd.readouterr().out.count("DataError: ") == 1
    assert not (tmp_path / "bare").exists()


def test_a_killed_rank_takes_the_others_along(zygote, tmp_path):
    run = tiny_run(tmp_path, ENDLESS)
    with ThreadPoolExecutor() as pool:
        codes = pool.submit(zygote.run, ["--config", str(run.config)], 2)
        wait_for(lambda: run.metrics.exists() and len(read(run.metrics)) >= 3)
        os.kill(read_json(run.rank(1) / "rank.json")["pid"], signal.SIGKILL)
        assert codes.result() == [9, -9]
    assert [error["rank"] for error in run.errors()] == [0]


def test_ranks_that_do_not_end_are_killed(zygote, tmp_path):
    run = tiny_run(tmp_path, ENDLESS)
    began = time.monotonic()
    assert zygote.run(["--config", str(run.config)], 2, timeout_s=3) == [-9, -9]
    assert 3 <= time.monotonic() - began < 10


def add(summand: int) -> tuple[int, float]:
    import torch
    import torch.distributed as dist

    total = torch.tensor(float(dist.get_rank() + summand))
    dist.all_reduce(total)
    return os.getpid(), total.item()


def test_a_function_on_fresh_ranks(zygote):
    results = zygote.run_function(add, (10,), 3)
    assert [total for _, total in results] == [33.0] * 3
    assert len({pid for pid, _ in results}) == 3


def lose(number: int) -> str:
    """Called on every rank: rank 1 sends itself a signal; rank 0 returns whether it noticed."""
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), number)
    try:
        dist.barrier()
    except RuntimeError:
        return "lost"
    return "never"


def test_a_function_may_lose_a_rank(zygote):
    assert zygote.run_function(lose, (signal.SIGKILL,), 2) == ["lost", Killed(signal.SIGKILL)]


def test_a_rank_that_hangs_is_named(zygote):
    with pytest.raises(AssertionError, match=r"ranks that did not answer: \[0, 1\]"):
        zygote.run_function(lose, (signal.SIGSTOP,), 2, timeout_s=3)


def fail() -> None:
    raise KeyError("a bug of a case")


def test_a_rank_that_raises_is_quoted(zygote):
    with pytest.raises(AssertionError, match=r"rank 1:\nTraceback(.|\n)*KeyError: 'a bug of a case'"):
        zygote.run_function(fail, (), 2)
