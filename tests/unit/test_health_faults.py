"""STACK_FAULT: faults happen in the right phase and step, and wrong values are refused."""

import errno
import os
import signal
import time

import pytest

from stack.errors import ConfigError
from stack.health.faults import FAULT, PHASES, Faults


def faults(monkeypatch: pytest.MonkeyPatch, value: str, rank: int = 0) -> Faults:
    monkeypatch.setenv(FAULT, value)
    return Faults.from_environment(rank)


def test_without_faults_nothing_happens(monkeypatch):
    monkeypatch.delenv(FAULT, raising=False)
    for phase in PHASES:
        Faults.from_environment(0)(phase, 1)


@pytest.mark.parametrize(("kind", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_a_signal_comes_from_inside_at_its_moment(monkeypatch, kind, number):
    fault = faults(monkeypatch, f"{kind}:rank=1,step=9,phase=save.before_manifest", rank=1)
    if (pid := os.fork()) == 0:
        fault("save.before_manifest", 8)
        fault("save.before_rename", 9)
        fault("save.before_manifest", 9)
        os._exit(7)
    _, status = os.waitpid(pid, os.WUNTRACED)
    try:
        assert (os.WIFSTOPPED(status), os.WIFSIGNALED(status)) == (kind == "stop", kind == "kill")
        assert (os.WSTOPSIG(status) if kind == "stop" else os.WTERMSIG(status)) == number
    finally:
        if kind == "stop":
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_full_disk_is_an_error_once(monkeypatch):
    fault = faults(monkeypatch, "full:phase=save.half_shard")
    with pytest.raises(OSError, match="No space left") as caught:
        fault("save.half_shard", 3)
    assert caught.value.errno == errno.ENOSPC
    fault("save.half_shard", 4)


def test_several_faults_and_other_ranks(monkeypatch):
    value = "full:rank=0,step=2,phase=step; sleep:seconds=0.05,phase=step ;full:rank=1,phase=step"
    fault = faults(monkeypatch, value)
    began = time.monotonic()
    fault("step", 1)
    assert time.monotonic() - began >= 0.05
    with pytest.raises(OSError, match="No space"):
        fault("step", 2)
    fault("step", 2)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("kil:phase=step", "no such fault; use kill, stop, full or sleep"),
        ("kill", "'' must be one of rank, step, phase or seconds=..., each given once"),
        ("kill:rank=1", "phase must be step, save.stage, "),
        ("kill:phase=save.never", "phase must be step, save.stage, "),
        ("kill:phase=step,rank=one", "rank is a number, as in rank=1"),
        ("kill:phase=step,when=1", "'when=1' must be one of"),
        ("kill:phase=step,step=1,step=2", "'step=2' must be one of"),
        ("sleep:phase=step", "seconds is for sleep"),
        ("kill:phase=step,seconds=1", "seconds is for sleep"),
        ("kill:phase=step;nonsense", "STACK_FAULT=nonsense: no such fault"),
    ],
)
def test_a_malformed_value_is_refused_on_every_rank(monkeypatch, value, words):
    with pytest.raises(ConfigError) as caught:
        faults(monkeypatch, value, rank=5)
    assert words in str(caught.value)
