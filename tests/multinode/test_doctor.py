"""`stack doctor` on two hosts. test_driver.py tests the faults that `stack train` finds too."""

import subprocess
from pathlib import Path

import pytest

from tests.helpers.runs import STACK
from tests.multinode.conftest import BOTH, as_overrides
from tests.multinode.hosts import Hosts

pytestmark = pytest.mark.ci


@pytest.fixture
def doctor(hosts: Hosts, tiny: dict[str, object], tmp_path: Path):
    """`doctor("--parity")` runs `stack doctor --parity` on host-a."""

    def run(*flags: str):
        own = {**tiny, "run.root": tmp_path / "runs", "launch.hostfile": hosts.hostfile(BOTH)}
        own.pop("launch.ranks_per_node")
        command = hosts.on("host-a", [STACK, "doctor", *flags, *as_overrides(own)])
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)

    return run


def test_parity_of_one_stage_on_each_host(doctor, hosts):
    done = doctor("--parity")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split()[:4] for line in done.stdout.splitlines()[1:3]]
    assert rows == [["host-a", "ok", "192.0.2.1", "(wire0)"], ["host-b", "ok", "192.0.2.2", "(wire0)"]]
    links, parity, verdict = done.stdout.splitlines()[-3:]
    assert verdict == "all is well: 2 ranks on 2 hosts"
    assert links.startswith("2 ranks on 2 hosts (gloo): ring ")
    assert parity.startswith("parity fp32, PP2 x DP1, ZeRO-3, 1f1b")
    assert parity.endswith(": ok")
    assert not hosts.processes("host-b", "stack.")


def test_a_folder_that_is_not_shared(doctor, hosts, tmp_path):
    (tmp_path / "runs").mkdir()
    hosts.run("host-b", ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "runs")])
    done = doctor()
    assert done.returncode == 9
    assert done.stderr == (
        f"HostError: host-b: {tmp_path}/runs/doctor does not exist there; "
        "put run.root on a file system that all hosts share\n"
    )
