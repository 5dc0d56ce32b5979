"""Runs over two hosts that the `deepspeed` launcher itself starts on one of them, also with failures of a host."""

import os
import subprocess
import time

import psutil
import pytest

from tests.helpers.runs import STACK, Command
from tests.multinode.conftest import BOTH, as_overrides
from tests.multinode.hosts import WIRE, two_hosts

pytestmark = pytest.mark.ci

HANG_S = 5
#: Longer than any test waits.
ENDLESS = {
    "train.steps": 1_000_000,
    "schedule.kind": "constant",
    "train.log_every": 1000,
    "health.hang_timeout_s": HANG_S,
}


def numbers(command):
    return [(row.loss.hex(), row.grad_norm.hex()) for row in command.records()]


def assert_nothing_left(hosts, *, within_s=1):
    deadline = time.monotonic() + within_s
    while left := [(host, p.info["cmdline"]) for host in hosts.names for p in hosts.processes(host)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.fixture
def running(start_bare):
    """An endless run with one stage on each host, at its third step."""
    command = start_bare(BOTH, ENDLESS)
    command.wait_for_step(3)
    return command


def test_the_hosts_reach_each_other_and_end_with_all_that_runs_there(tmp_path):
    before = os.listdir("/sys/class/net")
    with pytest.raises(ZeroDivisionError), two_hosts(tmp_path) as hosts:  # noqa: PT012 - a failure in the middle
        assert hosts.run("host-a", ["ssh", "host-b", "hostname; hostname -I"]) == "host-b\n192.0.2.2 \n"
        assert hosts.run("host-b", ["ssh", "host-a", "hostname; hostname -I"]) == "host-a\n192.0.2.1 \n"
        sleeping = subprocess.Popen(hosts.on("host-b", ["sleep", "1000"]))
        while not (inside := hosts.processes("host-b", "sleep 1000")):
            assert sleeping.poll() is None
        assert not hosts.processes("host-a")
        assert os.listdir("/sys/class/net") == before
        assert WIRE not in before
        raise ZeroDivisionError
    sleeping.wait(5)
    assert not inside[0].is_running()
    folder = str(tmp_path)
    assert not [p for p in psutil.process_iter(["cmdline"]) if folder in " ".join(p.info["cmdline"] or ())]


def test_two_hosts_train_as_one_does(start_bare, hosts, tiny, tmp_path):
    overrides = as_overrides({**tiny, "run.root": tmp_path / "one/runs"})
    one = Command([STACK, "train", *overrides], tmp_path / "one")
    try:
        two = start_bare(BOTH)
        assert two.wait() == 0, two.stdout + two.stderr
        assert one.wait() == 0, one.stdout + one.stderr
    finally:
        one.kill()
    assert_nothing_left(hosts)
    assert two.json("DONE.json")["step"] == 5
    assert [two.json(f"ranks/{rank}/rank.json")["host"] for rank in (0, 1)] == hosts.names
    assert len(numbers(one)) == 5
    assert numbers(two) == numbers(one)


def test_a_first_host_that_refuses_ssh_starts_nothing(start_bare, hosts, tmp_path):
    hosts.stop_sshd("host-a")
    command = start_bare(BOTH, ENDLESS)

    assert command.wait() == 1
    assert "host=host-a was not reachable via ssh" in command.stderr
    assert_nothing_left(hosts)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("fault", ["refuses ssh", "has no address"])
def test_a_second_host_that_cannot_be_reached_is_named(start_bare, hosts, tmp_path, fault):
    other = "host-b"
    if fault == "refuses ssh":
        hosts.stop_sshd(other)
    else:
        other = "host-x"
    # The ranks of host-a wait in vain for those of the other host.
    command = start_bare({"host-a": 1, other: 1}, {**ENDLESS, "health.hang_timeout_s": 1})

    assert command.wait() == 255, command.stdout + command.stderr
    reason = "Connection refused" if other == "host-b" else "Could not resolve hostname host-x"
    assert f"{other}: ssh: " in command.stderr
    assert reason in command.stderr
    assert "HangError: another rank did not answer within health.hang_timeout_s" in command.stderr
    assert_nothing_left(hosts)
    assert not (tmp_path / "runs").exists()


def test_a_host_whose_launcher_is_killed_ends_the_run(running, hosts):
    [launcher] = [p for p in hosts.processes("host-b", "deepspeed.launcher.launch") if "python" in p.name()]
    launcher.kill()

    assert running.wait(15) == 255, running.stdout + running.stderr
    assert_nothing_left(hosts)
    failure = running.json("FAILED.json")
    assert (failure["type"], failure["exit_code"], failure["rank"]) == ("RankFailure", 9, 1)
    assert "was killed, so its ranks end too" in failure["message"]
    assert not (running.run / "DONE.json").exists()


def test_a_cut_cable_ends_the_ranks_of_both_hosts(running, hosts):
    hosts.cut()

    deadline = time.monotonic() + HANG_S + 10
    while left := [p for host in hosts.names for p in hosts.processes(host, "stack.train") if _is_rank(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    for rank in (0, 1):
        error = running.json(f"ranks/{rank}/error.json")
        assert (error["type"], error["exit_code"]) == ("HangError", 8)
    assert running.json("FAILED.json")["type"] == "HangError"
    assert not (running.run / "DONE.json").exists()


def _is_rank(process):
    return process.info["cmdline"][1:4] == ["-u", "-m", "stack.train"]
