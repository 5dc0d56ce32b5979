"""Where the ranks of a run meet: the hosts, the address of the first host, and a port there."""

import contextlib
import os
import random
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stack.config.schema import Config
from stack.errors import HostError, LayoutError
from stack.launch.hosts import LOCALHOST, Host, hosts
from stack.launch.preflight import check_hosts
from stack.plan.layout import Plan

#: Below the range from which Linux assigns ports by itself.
_PORTS = range(20000, 30000)


@dataclass(frozen=True)
class Place:
    """Where the ranks of a run meet."""

    hosts: list[Host]
    """The hosts that have an agent. With Slurm only this host has one: its srun starts the tasks of all hosts."""
    nodes: int
    """Number of hosts that have ranks."""
    address: str
    """Address of the first host with ranks, as the other hosts reach it."""
    port: int
    interfaces: list[str | None]
    """For each host, the network interface that leads to the other hosts; None for a run on one host."""
    options: list[str] = field(default_factory=list)
    """Options for srun: `launch.slurm`."""

    @property
    def shown(self) -> str:
        """Description for the user."""
        names = ", ".join(host.name for host in self.hosts)
        if self.nodes == 1 or len(self.hosts) < self.nodes:
            return f"{self.nodes} {'host' if self.nodes == 1 else 'hosts'}, master {self.address}:{self.port}"
        interfaces = ", ".join(sorted({name for name in self.interfaces if name}))
        return f"{names}; master {self.address}:{self.port}, interface {interfaces}"


def meet(cfg: Config, plan: Plan, folder: Path, requests: Sequence[signal.Signals] = ()) -> Place:
    """Finds the hosts of a run and where the ranks meet. Checks each host before ranks are started.

    Args:
        folder: the run directory, which all hosts must see.
        requests: signals that asked this process to end, as they come in; after the first one no host is waited for.

    Raises:
        HostError: a host cannot be used.
        LayoutError: the hostfile or the allocation does not fit the plan.
    """
    if cfg.launch.backend == "slurm":
        names = _allocated()
        address = names[0] if plan.nodes > 1 else "127.0.0.1"
        here = Host(LOCALHOST, plan.world_size, here=True)
        return Place([here], plan.nodes, address, random.choice(_PORTS), [None], cfg.launch.slurm)
    found = hosts(cfg, plan)
    if len(found) == 1 and found[0].here:
        return Place(found, 1, "127.0.0.1", free_port(), [None])
    reports = check_hosts(found, folder, requests=requests)
    port = free_port() if found[0].here else random.choice(_PORTS)
    return Place(found, len(found), reports[0].address, port, [report.interface for report in reports])


def free_port() -> int:
    """A TCP port of this host that no process listens on now, and that Linux does not assign by itself.

    Raises:
        HostError: all ports are taken.
    """
    for port in random.sample(_PORTS, len(_PORTS)):
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise HostError(
        f"ports {_PORTS.start} to {_PORTS.stop - 1} are all taken on this host; stop a process that listens there"
    )


def _allocated() -> list[str]:
    """Names of the hosts of the Slurm allocation, the first one first.

    Raises:
        LayoutError: scontrol cannot name the hosts.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    told = subprocess.run(["scontrol", "show", "hostnames", nodes], check=False, capture_output=True, text=True)
    if told.returncode or not told.stdout.split():
        raise LayoutError(f"SLURM_JOB_NODELIST={nodes}: scontrol show hostnames gives no host; use salloc or sbatch")
    return told.stdout.split()
