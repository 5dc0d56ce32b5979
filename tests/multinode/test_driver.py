"""`stack train` over two hosts gives the same run as on one host, and names the host or rank that fails."""

import signal
import time
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

from tests.helpers.runs import STACK, Command
from tests.multinode.conftest import as_overrides

pytestmark = pytest.mark.ci

#: The run and the hang timeout are longer than any test waits, so that a fault must be found in another way.
ENDLESS = {
    "train.steps": 1_000_000,
    "schedule.kind": "constant",
    "train.log_every": 1000,
    "health.hang_timeout_s": 600,
    "launch.grace_s": 2,
}


def numbers(command):
    return [(row.loss.hex(), row.grad_norm.hex()) for row in command.records()]


def assert_nothing_left(hosts, *, within_s=1):
    deadline = time.monotonic() + within_s
    while left := [(host, p.info["cmdline"]) for host in hosts.names for p in hosts.processes(host)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def assert_failed(command, message, *, rank=None, kind="RankFailure", within_s=15):
    assert command.wait(within_s) == 9, command.stdout + command.stderr
    failure = command.json("FAILED.json")
    assert (failure["type"], failure["exit_code"], failure["rank"]) == (kind, 9, rank)
    assert message in failure["message"]
    assert message in command.stdout
    assert "Traceback" not in command.stdout + command.stderr
    assert not (command.run / "DONE.json").exists()


@pytest.fixture
def running(start):
    """An endless run with one stage on each host, at its third step."""
    command = start(ENDLESS)
    command.wait_for_step(3)
    return command


@pytest.mark.parametrize("backend", ["deepspeed", "torchrun"])
def test_two_hosts_train_as_one_does(start, hosts, tiny, tmp_path, backend):
    one = Command([STACK, "train", *as_overrides({**tiny, "run.root": tmp_path / "one/runs"})], tmp_path / "one")
    try:
        two = start({"launch.backend": backend})
        assert two.wait() == 0, two.stdout + two.stderr
        assert one.wait() == 0, one.stdout + one.stderr
    finally:
        one.kill()
    assert_nothing_left(hosts)
    assert "on host-a, host-b; master 192.0.2.1:" in two.stdout
    assert "interface wire0" in two.stdout
    assert [two.json(f"ranks/{rank}/rank.json")["host"] for rank in (0, 1)] == hosts.names
    assert len(numbers(one)) == 5
    assert numbers(two) == numbers(one)


def no_sshd(hosts, _folder):
    hosts.stop_sshd("host-b")


def no_cable(hosts, _folder):
    hosts.cut()


def no_name(hosts, _folder):
    hosts.write_names({"host-a": "192.0.2.1"})


def another_version(hosts, folder):
    """Gives transformers another version on host-b, by a file that is mounted there only."""
    metadata = Path(str(distribution("transformers").locate_file(f"transformers-{version('transformers')}.dist-info")))
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    hosts.run("host-b", ["mount", "--bind", str(folder / "METADATA"), str(metadata / "METADATA")])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (no_sshd, "host-b: ssh is refused; start sshd there"),
        (no_cable, "host-b: cannot be reached; check that it is on"),
        (no_name, "host-b: its name does not resolve here; correct the hostfile, or /etc/hosts"),
        (another_version, "host-b has transformers 4.0.0, the others"),
    ],
)
def test_a_host_that_cannot_be_used_is_named_before_anything_is_started(start, hosts, tmp_path, fault, message):
    fault(hosts, tmp_path)
    command = start(ENDLESS)

    assert_failed(command, message, kind="HostError", within_s=40)
    assert not list(command.run.glob("launchers/*"))
    assert_nothing_left(hosts)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_on_whichever_host_it_was(running, hosts, rank):
    pid = running.json(f"ranks/{rank}/rank.json")["pid"]
    hosts.run(hosts.names[rank], ["kill", "-KILL", str(pid)])

    assert_failed(running, f"process {pid} was killed or crashed", rank=rank)
    assert_nothing_left(hosts)


def test_a_killed_launcher_is_named(running, hosts):
    [launcher] = [p for p in hosts.processes("host-b", "deepspeed.launcher.launch") if "python" in p.name()]
    launcher.kill()

    assert_failed(running, "was killed, so its ranks end too", rank=1)
    assert_nothing_left(hosts)


def test_a_killed_agent_is_named(running, hosts):
    [agent] = [p for p in hosts.processes("host-b", "stack.launch.agent") if "python" in p.name()]
    agent.kill()

    assert_failed(running, "host-b", kind="HostError")
    assert_nothing_left(hosts, within_s=5)


def test_a_cut_cable_names_the_host_that_is_gone(running, hosts):
    hosts.cut()

    # ssh waits 15 s for an answer.
    assert_failed(running, "host-b could not be reached, or was lost", kind="HostError", within_s=30)
    # The processes on host-b end after 30 s without a message of the driver.
    assert_nothing_left(hosts, within_s=30)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 75), (signal.SIGTERM, 75)])
def test_a_run_that_is_told_to_end_ends_on_both_hosts(running, hosts, number, code):
    [driver] = [p for p in hosts.processes("host-a", "bin/stack train") if "python" in p.name() or "stack" in p.name()]
    driver.send_signal(number)

    assert running.wait(15) == code, running.stdout + running.stderr
    assert_nothing_left(hosts)
    assert bool(running.json("SAVED.json")) == (code == 75)


def test_no_rank_outlives_a_killed_driver(running, hosts):
    [driver] = [p for p in hosts.processes("host-a", "bin/stack train") if "python" in p.name() or "stack" in p.name()]
    driver.kill()

    assert_nothing_left(hosts, within_s=10)
    assert "the driver is gone" in running.json("FAILED.json")["message"]
