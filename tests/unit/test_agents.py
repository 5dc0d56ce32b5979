"""An agent that hangs, is silent or writes too much never blocks the driver."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from stack.launch import agents
from stack.launch.agent import Voice
from stack.launch.agents import Agent
from stack.launch.hosts import Host
from stack.launch.order import Order
from stack.launch.verdict import Report

REPORT = json.dumps({"report": asdict(Report("host", 2, [], 1))})


@pytest.fixture
def start(monkeypatch, tmp_path) -> Iterator:
    """`start(script)` starts a shell script in the place of an agent."""
    started: list[Agent] = []

    def start(script: str) -> Agent:
        monkeypatch.setattr(agents, "module_on", lambda _host, _module: ["bash", "-c", script])
        monkeypatch.setattr(agents, "BEAT_S", 0.1)
        order = Order(str(tmp_path), "host", [0, 1], [], {}, grace_s=0.2, silence_s=None)
        started.append(Agent(Host("host", 2, here=True), order, tmp_path / "launchers" / "host.log"))
        return started[-1]

    yield start
    for agent in started:
        agent.stop()
        agent.wait()


def until(probe, within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_login_shell_prints_is_not_for_the_driver(start):
    agent = start(f"echo Welcome to host; echo '[1, 2]'; echo 7; printf '\\xff\\n\\n'; echo '{REPORT}'")
    until(lambda: agent.ended)
    assert agent.report == Report("host", 2, [], 1)


def test_an_agent_that_ends_without_a_report_is_lost(start):
    agent = start("echo out of luck >&2; exit 3")
    until(lambda: agent.ended)
    assert agent.lost().message == "host lost its agent (3): out of luck"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exec >&-; sleep 60", "its agent has closed its output and does not end: a bug in stack"),
        ('echo \'{"report": {"host": 1}}\'; sleep 60', "the output of its agent cannot be read (KeyError: "),
    ],
)
def test_an_agent_that_lives_and_cannot_be_heard_blocks_nobody(start, script, message, monkeypatch):
    monkeypatch.setattr(agents, "_LAST_S", 0.1)
    agent = start(script)
    until(lambda: agent.ended)
    began = time.monotonic()
    assert message in agent.lost().message
    assert time.monotonic() - began < 0.1


def test_an_agent_that_is_stopped_is_named_and_ended(start, monkeypatch):
    monkeypatch.setattr(agents, "_SILENT_S", 3.0)
    agent = start("echo; exec sleep 60")
    until(agent._heard.is_set)
    os.kill(agent._process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, agent._process.pid, os.WSTOPPED | os.WNOWAIT)
    assert [agent.silent(1.0) for _ in range(3)] == [None] * 3
    failure = agent.silent(1.0)
    assert failure.message.startswith(f"host: its agent (process {agent._process.pid}) was stopped by SIGSTOP")
    assert (failure.type, failure.exit_code) == ("HostError", 9)
    began = time.monotonic()
    agent.stop()
    agent.wait()
    assert time.monotonic() - began < 1


def test_an_agent_whose_host_hangs_is_named(start, monkeypatch):
    monkeypatch.setattr(agents, "_SILENT_S", 3.0)
    agent = start("echo; exec sleep 60")
    until(agent._heard.is_set)
    found = [agent.silent(1.0) for _ in range(4)]
    assert found[-1].message == "host: its agent was silent for 3 s; the host hangs, or the agent is stopped there"


def test_a_driver_that_was_suspended_hears_first_what_was_said_meanwhile(start):
    agent = start("echo; exec sleep 60")
    until(agent._heard.is_set)
    # An hour has passed, but the driver has not read the pipe in the meantime, so the agent does not count as silent.
    assert agent.silent(3600.0) is None
    agent._heard.set()
    assert agent.silent(3600.0) is None


def test_two_threads_of_an_agent_never_cut_each_others_lines():
    read, write = os.pipe()
    voice = Voice(write)
    voice.beat()
    long = {"report": "x" * 50_000}
    voice.say(long)
    voice.say()
    os.close(write)
    with open(read) as file:
        assert [json.loads(line) for line in file if line.strip()] == [long]
    # The reader is gone; `say` must not raise.
    voice.say(long)


def test_the_agent_says_that_it_is_at_work_before_it_has_an_order():
    import subprocess

    from stack.launch.hosts import module_on

    command = module_on(Host("here", 1, here=True), "stack.launch.agent")
    assert command[:2] == [sys.executable, "-P"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as agent:
        assert agent.stdout.readline() == b"\n"
        agent.kill()
