"""The hosts of a run, and how a Python module is started on one: here, or through ssh."""

import shlex
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import psutil

from stack.config.schema import Config
from stack.interpreter import PYTHON
from stack.plan.hosts import hosts_of
from stack.plan.layout import Plan

#: BatchMode: ssh must never prompt, because nobody can answer. The keep-alives detect within 15 s that a host is off or
#: that its network cable is unplugged.
_SSH = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3")
#: Name of the host of a run without a hostfile.
LOCALHOST = "localhost"


@dataclass(frozen=True)
class Host:
    """A host of a run."""

    name: str
    """As in the hostfile."""
    slots: int
    """Ranks to start there."""
    here: bool
    """Whether the host is this machine, where commands start without ssh."""


def hosts(cfg: Config, plan: Plan) -> list[Host]:
    """The hosts that ranks are started on, in the order of the ranks.

    Raises:
        LayoutError: the hostfile cannot be read.
    """
    slots = plan.world_size // plan.nodes
    names = hosts_of(cfg)
    if names is None:
        return [Host(LOCALHOST, plan.world_size, here=True)]
    return [Host(name, slots, here=is_here(name)) for name in names]


def is_here(name: str) -> bool:
    """Whether a host's name means this machine."""
    if name in (LOCALHOST, socket.gethostname()):
        return True
    try:
        found = {about[4][0] for about in socket.getaddrinfo(name, None)}
    except (OSError, UnicodeError):
        # ssh may know the name from its own config. If not, ssh reports the error.
        return False
    return bool(found & {address.address for addresses in psutil.net_if_addrs().values() for address in addresses})


def module_on(host: Host, module: str) -> list[str]:
    """The command that runs a Python module on a host. Only this command passes through a shell; the module reads its
    input from standard input."""
    here = [*PYTHON, "-m", module]
    if host.here:
        return here
    options = [word for option in _SSH for word in ("-o", option)]
    # exec: otherwise the shell that ssh starts stays between ssh and the module.
    return ["ssh", "-T", *options, host.name, f"exec {shlex.join(here)}"]


def forwarded(environment: Mapping[str, str], patterns: list[str]) -> dict[str, str]:
    """The variables that are passed to another host: those that match a pattern of `launch.env`."""
    return {
        name: value for name, value in environment.items() if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
