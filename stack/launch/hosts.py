"""The hosts of a run, and how a Python module is started on one: here, or through ssh."""

import shlex
import sys
from dataclasses import dataclass

#: No question can be answered; a host that is off, or a cable that is out, is noticed within 15 s.
_SSH = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3")


@dataclass(frozen=True)
class Host:
    """A host of a run."""

    name: str
    """As in the hostfile."""
    slots: int
    """Ranks to start there."""
    here: bool
    """This machine: no ssh."""


def module_on(host: Host, module: str) -> list[str]:
    """The command that runs a Python module on a host. Nothing but these words passes through a shell: what the module
    needs it reads from its standard input."""
    here = [sys.executable, "-m", module]
    if host.here:
        return here
    options = [word for option in _SSH for word in ("-o", option)]
    # exec: else the shell that ssh starts stays between the module and its standard input.
    return ["ssh", "-T", *options, host.name, f"exec {shlex.join(here)}"]
