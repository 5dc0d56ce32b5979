"""The progress of each rank: two numbers in its memory, which another process of the same user on the host can read.

They are read only when ranks hang, to find the rank for which all others wait.
"""

import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import psutil

from stack.observe.metrics import StepRecord
from stack.train import rundir
from stack.train.rundir import RunDir

_NUMBERS = struct.Struct("<qq")


class Phase(IntEnum):
    """The part of its work in which a rank is."""

    STARTING = 0
    READING = 1
    """Reading weights or a checkpoint."""
    TRAINING = 2
    """In the training loop: forwards, backwards, updates, evaluations, saves."""
    ENDING = 3


class Progress:
    """This rank's two numbers, in an anonymous file in memory. A write costs a microsecond."""

    def __init__(self) -> None:
        self.file = os.memfd_create("stack-progress")
        """Descriptor of the file; other processes open it as /proc/PID/fd/NUMBER."""
        os.ftruncate(self.file, _NUMBERS.size)
        self._memory = mmap.mmap(self.file, _NUMBERS.size)

    def at(self, phase: Phase, step: int) -> None:
        """Sets the phase of this rank and its number of finished steps."""
        _NUMBERS.pack_into(self._memory, 0, step, phase)

    def counted(self, record: Callable[[StepRecord], None]) -> Callable[[StepRecord], None]:
        """A function that calls `record` and then sets the progress to the step of the row."""

        def counting(row: StepRecord) -> None:
            record(row)
            self.at(Phase.TRAINING, row.step)

        return counting


@dataclass(frozen=True)
class Look:
    """The state of a rank that is alive and has not reported a failure, read on its host while ranks hang."""

    rank: int
    host: str
    pid: int
    stopped: bool
    """Whether SIGSTOP or a debugger has stopped the process."""
    step: int
    """Number of finished steps."""
    phase: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid}, {self.phase} after step {self.step})"


def look(run: RunDir, ranks: Iterable[int]) -> list[Look]:
    """The state of those of `ranks` that are alive on this host and have not reported a failure or their end.

    Ranks that were asked to stop are included: a launcher asks all of its ranks to end after the first failure, so such
    a rank may still be the one for which the others wait.
    """
    here, found = socket.gethostname(), []
    for rank in ranks:
        about = rundir.read_json(run.rank(rank) / "rank.json")
        if about and about["host"] == here and run.outcome(rank) in (None, "stopped") and (seen := _see(rank, about)):
            found.append(seen)
    return found


def _see(rank: int, about: dict[str, Any]) -> Look | None:
    """The state of one rank; None where its process has ended, or another process has its id.

    Args:
        rank: the rank.
        about: content of its rank.json.
    """
    pid = about["pid"]
    try:
        stopped = psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        step, phase = _NUMBERS.unpack(Path(f"/proc/{pid}/fd/{about['progress']}").read_bytes())
        return Look(rank, about["host"], pid, stopped, step, Phase(phase).name.lower())
    except (psutil.NoSuchProcess, OSError, struct.error, ValueError, KeyError):
        return None


def absent(looks: Iterable[Look]) -> list[Look]:
    """The ranks for which the others probably wait: the stopped ones, or if there are none, the ones with the fewest
    finished steps."""
    looks = list(looks)
    fewest = min((seen.step for seen in looks), default=0)
    return [seen for seen in looks if seen.stopped] or [seen for seen in looks if seen.step == fewest]
