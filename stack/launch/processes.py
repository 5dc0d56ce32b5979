"""Stopping every process of a run, by process id."""

import contextlib
import socket
from dataclasses import dataclass

import psutil

from stack.train.rundir import RunDir, read_json


@dataclass(frozen=True)
class Rank:
    """A rank of this host as the driver sees it."""

    rank: int
    process: psutil.Process

    @property
    def alive(self) -> bool:
        """False from the moment it died, also while its launcher has not yet noticed."""
        try:
            return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def local_ranks(run: RunDir, known: dict[int, Rank]) -> dict[int, Rank]:
    """The ranks of this host that have said who they are, added to those already `known`."""
    found = dict(known)
    for file in run.path.glob("ranks/*/rank.json"):
        rank = int(file.parent.name)
        about = read_json(file) if rank not in found else None
        if about and about["host"] == socket.gethostname():
            with contextlib.suppress(psutil.NoSuchProcess):
                found[rank] = Rank(rank, psutil.Process(about["pid"]))
    return found


def stop(launcher: psutil.Popen, ranks: dict[int, Rank], *, grace_s: float) -> None:
    """Ends the launcher, everything below it and the ranks: SIGTERM, then SIGKILL after `grace_s` seconds."""
    processes = {rank.process for rank in ranks.values()}
    with contextlib.suppress(psutil.NoSuchProcess):
        processes |= {launcher, *launcher.children(recursive=True)}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(list(processes), timeout=grace_s)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=grace_s)
