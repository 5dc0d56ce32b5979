"""Processes of this host: finds the ranks of a run, and ends all processes of a session."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from stack.health.orphan import is_alive
from stack.train.rundir import RunDir, read_json

_POLL_S = 0.05


@dataclass(frozen=True)
class Rank:
    """A rank of this host."""

    rank: int
    pid: int
    process: psutil.Process | None
    """None if the process ended before it was looked up."""

    @property
    def alive(self) -> bool:
        """False from the moment the process died, also before its launcher has noticed."""
        return self.process is not None and is_alive(self.process)


def local_ranks(run: RunDir, ranks: Iterable[int]) -> tuple[dict[int, Rank], set[int]]:
    """The ranks in `ranks` that have written rank.json: those on this host, and the numbers of those on other hosts."""
    here: dict[int, Rank] = {}
    elsewhere: set[int] = set()
    for rank in ranks:
        about = read_json(run.rank(rank) / "rank.json")
        if about and about["host"] == socket.gethostname():
            here[rank] = Rank(rank, about["pid"], _process(about["pid"]))
        elif about:
            elsewhere.add(rank)
    return here, elsewhere


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def signal_ranks(ranks: Iterable[Rank], number: signal.Signals) -> None:
    """Sends a signal to the ranks that are still alive."""
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            if rank.process is not None:
                # send_signal compares the start time first, so that no other process with a reused id is hit.
                rank.process.send_signal(number)


def end_session(leader: int, *, grace_s: float) -> None:
    """Ends all processes of a session but this one: SIGTERM, then SIGKILL after `grace_s` seconds; SIGKILL at once to a
    process that is stopped, which no other signal reaches.

    The session also contains ranks that have not yet written rank.json, and ranks whose launcher is gone.
    """
    # The second SIGKILL is for a process that was being started during the first.
    for end in (_terminate, psutil.Process.kill, psutil.Process.kill):
        for process in _session(leader):
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        deadline = time.monotonic() + grace_s
        while _session(leader) and time.monotonic() < deadline:
            time.sleep(_POLL_S)


def _terminate(process: psutil.Process) -> None:
    if process.status() == psutil.STATUS_STOPPED:
        process.kill()
    else:
        process.terminate()


def _session(leader: int) -> list[psutil.Process]:
    """The live processes of a session. The id of the session is not reused while one of them exists."""
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if pid != os.getpid() and os.getsid(pid) == leader and is_alive(process := psutil.Process(pid)):
                members.append(process)
    return members
