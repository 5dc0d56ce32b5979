"""Stopping every process of a run, by process id."""

import contextlib
import os
import socket
import subprocess
import time
from dataclasses import dataclass

import psutil

from stack.health.orphan import is_alive
from stack.train.rundir import RunDir, read_json

_POLL_S = 0.05


@dataclass(frozen=True)
class Rank:
    """A rank of this host as the driver sees it."""

    rank: int
    pid: int
    process: psutil.Process | None
    """None where it was gone before the driver first looked."""

    @property
    def alive(self) -> bool:
        """False from the moment it died, also while its launcher has not yet noticed."""
        return self.process is not None and is_alive(self.process)


def local_ranks(run: RunDir, known: dict[int, Rank]) -> dict[int, Rank]:
    """The ranks of this host that have said who they are, added to those already `known`."""
    found = dict(known)
    for file in run.path.glob("ranks/*/rank.json"):
        rank = int(file.parent.name)
        about = read_json(file) if rank not in found else None
        if about and about["host"] == socket.gethostname():
            found[rank] = Rank(rank, about["pid"], _process(about["pid"]))
    return found


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def stop(launcher: subprocess.Popen, *, grace_s: float) -> None:
    """Ends all processes of the session that `launcher` leads: SIGTERM, then SIGKILL after `grace_s` seconds.

    The session also holds a rank that has not yet said who it is, and one whose launcher is gone.
    """
    # The second SIGKILL is for a process that was being started during the first.
    for end in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):
        for process in _session(launcher.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        deadline = time.monotonic() + grace_s
        while _session(launcher.pid) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    launcher.poll()


def _session(leader: int) -> list[psutil.Process]:
    """The live processes of a session. Its id is not given away while one of them is there."""
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(pid) == leader and is_alive(process := psutil.Process(pid)):
                members.append(process)
    return members
