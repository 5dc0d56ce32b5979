"""A rank ends when its agent has ended, and when the agent was stopped for long."""

import os
import signal
import subprocess

import pytest

from stack.health import orphan


@pytest.fixture
def agent():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(("number", "how"), [(signal.SIGSTOP, "was stopped"), (signal.SIGKILL, "was killed")])
def test_a_rank_ends_with_its_agent(agent, number, how, monkeypatch):
    monkeypatch.setattr(orphan, "_POLL_S", 0.01)
    monkeypatch.setattr(orphan, "_STOPPED_LOOKS", 3)
    ended, words = [], []
    monkeypatch.setattr(orphan.os, "_exit", ended.append)
    agent.send_signal(number)
    os.waitid(os.P_PID, agent.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    orphan._watch({"launcher": os.getpid(), "agent": agent.pid}, words.append)
    assert str(words[0]) == f"the agent (process {agent.pid}) {how}, so its ranks end too"
    assert ended == [9]


def test_a_launcher_that_is_stopped_ends_nothing(agent, monkeypatch):
    monkeypatch.setattr(orphan, "_POLL_S", 0.01)
    monkeypatch.setattr(orphan, "_STOPPED_LOOKS", 3)
    ended, words, looks = [], [], []
    monkeypatch.setattr(orphan.os, "_exit", ended.append)
    agent.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, agent.pid, os.WSTOPPED | os.WNOWAIT)
    monkeypatch.setattr(orphan.time, "sleep", lambda _: agent.kill() if looks.append(1) or len(looks) == 9 else None)
    orphan._watch({"launcher": agent.pid}, words.append)
    assert "was killed" in str(words[0])
