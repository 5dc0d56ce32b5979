"""Hosts of a run: the hostfile, the Slurm allocation, and the environment that other hosts get."""

import contextlib
import os
import socket
from dataclasses import replace

import pytest

from stack.config.compose import compose
from stack.errors import HostError, LayoutError
from stack.launch import backends, place
from stack.launch.hosts import Host, forwarded, is_here, module_on
from stack.launch.place import free_port
from stack.plan import policies
from stack.plan.hosts import ranks_of_hosts, read_hostfile
from stack.plan.layout import make_plan


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# the first rack\nnode-0 slots=4\n\nnode-1   slots = 4  # spare cable\nnode-2 slots=2\n")
    return path


def test_a_hostfile_keeps_its_order_and_its_comments_to_itself(hostfile):
    assert list(read_hostfile(hostfile).items()) == [("node-0", 4), ("node-1", 4), ("node-2", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-0\n", "line 1: 'node-0' is no host"),
        ("node-0 slots=0\n", "line 1: 'node-0 slots=0' is no host"),
        ("a slots=1\na slots=2\n", "line 2: a is listed twice"),
        ("# nothing\n", "names no host"),
        ("node-0 slots=1025\n", "line 1: slots=1025: no host has so many; use at most 1024"),
        (f"node-0 slots={'9' * 5000}\n", "line 1: slots=9+[.]{3}: no host has so many; use at most 1024"),
    ],
)
def test_a_hostfile_that_is_none_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(LayoutError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_a_hostfile_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "hosts")
    with pytest.raises(LayoutError, match=r"hosts: cannot be read \(it is no regular file\); a line is NAME"):
        read_hostfile(tmp_path / "hosts")


def test_a_variable_makes_no_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "_DEVICE_FILES", f"{tmp_path}/nvidia[0-9]*")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert policies.local_devices() == 0
    assert make_plan(compose()).reasons["ranks"] == "1 host x 4 ranks (no NVIDIA GPU here: the CPU default)"
    for number in range(8):
        (tmp_path / f"nvidia{number}").touch()
    assert policies.visible_devices() == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert policies.local_devices() == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert policies.local_devices() == 8


def test_the_first_hosts_of_the_file_are_used(hostfile):
    cfg = compose([f"launch.hostfile={hostfile}", "launch.nodes=2"])
    assert ranks_of_hosts(cfg) == (2, 4, "launch.hostfile, its slots")
    plan = make_plan(cfg)
    assert (plan.nodes, plan.world_size) == (2, 8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"node-2 has 2 slots, others have more.*launch.ranks_per_node=2"),
        (["launch.ranks_per_node=3"], r"node-2 has 2 slots.*use launch.ranks_per_node=2"),
        (["launch.nodes=4"], r"launch.nodes=4: .* has 3; use launch.nodes=auto"),
    ],
)
def test_what_the_hosts_do_not_have_is_refused(hostfile, overrides, message):
    with pytest.raises(LayoutError, match=message):
        make_plan(compose([f"launch.hostfile={hostfile}", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.nodes=2"], "launch.hostfile=FILE"),
        (["launch.backend=slurm"], "no Slurm allocation here.*salloc --nodes=1 --ntasks-per-node=4 stack train"),
        (["launch.backend=local", "launch.hostfile=hosts"], "use launch.backend=deepspeed"),
        (["launch.backend=slurm", "launch.hostfile=hosts"], "use launch.hostfile=null"),
    ],
)
def test_a_backend_without_what_it_needs_is_refused(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (tmp_path / "hosts").write_text("localhost slots=4\n")
    cfg = compose(["batch.global_size=64", *overrides])
    with pytest.raises(LayoutError, match=message):
        backends.check(cfg, make_plan(cfg))


def test_slurm_tells_hosts_and_ranks(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")
    cfg = compose(["launch.backend=slurm", "batch.global_size=64"])
    assert ranks_of_hosts(cfg) == (2, 8, "the allocation's tasks per node")
    # The allocation counts for the Slurm backend only. Other backends use this host, even inside an allocation.
    assert ranks_of_hosts(replace(cfg, launch=replace(cfg.launch, backend="deepspeed")))[0] == 1


def test_only_what_is_listed_crosses_to_another_host():
    here = {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "x", "HOME": "/root", "nccl_debug": "no", "XNCCL_DEBUG": "no"}
    assert forwarded(here, ["NCCL_*", "WANDB_*"]) == {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "x"}


def test_ssh_asks_nothing_and_carries_no_value():
    command = module_on(Host("node-1", 8, here=False), "stack.launch.agent")
    assert command[0] == "ssh"
    assert "BatchMode=yes" in command
    assert command[-2] == "node-1"
    assert command[-1].startswith("exec ")
    assert command[-1].endswith(" -m stack.launch.agent")


def test_this_machine_is_known_by_its_names():
    assert is_here("localhost")
    assert is_here("127.0.0.1")
    assert not is_here("192.0.2.200")
    assert not is_here("no-such-host.invalid")


def test_a_port_that_is_taken_is_passed_over(monkeypatch):
    with contextlib.closing(socket.create_server(("", 0))) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(place, "_PORTS", range(port, port + 20))
        assert free_port() in range(port + 1, port + 20)
        monkeypatch.setattr(place, "_PORTS", range(port, port + 1))
        with pytest.raises(HostError, match=f"ports {port} to {port} are all taken"):
            free_port()
