"""How far each rank is: two numbers in its memory, which a process of the same user on the same host may read. They
are read only when ranks hang, to tell the rank that all others wait for from those that wait."""

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
    """What a rank is at."""

    STARTING = 0
    READING = 1
    """Weights or a checkpoint."""
    TRAINING = 2
    """From one step's numbers to the next step's: forwards, backwards, the update, evaluations, saves."""
    ENDING = 3


class Progress:
    """This rank's two numbers. To write them costs a microsecond: they are in a file that has no name and no disk."""

    def __init__(self) -> None:
        self.file = os.memfd_create("stack-progress")
        """Its descriptor: others open it as /proc/PID/fd/NUMBER."""
        os.ftruncate(self.file, _NUMBERS.size)
        self._memory = mmap.mmap(self.file, _NUMBERS.size)

    def at(self, phase: Phase, step: int) -> None:
        """Says what this rank is at, and how many steps are done."""
        _NUMBERS.pack_into(self._memory, 0, step, phase)

    def counted(self, record: Callable[[StepRecord], None]) -> Callable[[StepRecord], None]:
        """`record`, and says how far this rank is with each row."""

        def counting(row: StepRecord) -> None:
            record(row)
            self.at(Phase.TRAINING, row.step)

        return counting


@dataclass(frozen=True)
class Look:
    """A rank that lives and has not said that it failed, as its host sees it while others hang."""

    rank: int
    host: str
    pid: int
    stopped: bool
    """By SIGSTOP or a debugger: it computes nothing."""
    step: int
    """Steps that it has done."""
    phase: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid}, {self.phase} after step {self.step})"


def look(run: RunDir, ranks: Iterable[int]) -> list[Look]:
    """Those of `ranks` that live on this host and have not said that they failed or are done. A launcher asks all its
    ranks to end once the first has failed, so one that was asked may still be the one that the others wait for."""
    here, found = socket.gethostname(), []
    for rank in ranks:
        about = rundir.read_json(run.rank(rank) / "rank.json")
        if about and about["host"] == here and run.outcome(rank) in (None, "stopped") and (seen := _see(rank, about)):
            found.append(seen)
    return found


def _see(rank: int, about: dict[str, Any]) -> Look | None:
    """None where the process is gone, or another one has its id."""
    pid = about["pid"]
    try:
        stopped = psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        step, phase = _NUMBERS.unpack(Path(f"/proc/{pid}/fd/{about['progress']}").read_bytes())
        return Look(rank, about["host"], pid, stopped, step, Phase(phase).name.lower())
    except (psutil.NoSuchProcess, OSError, struct.error, ValueError, KeyError):
        return None


def absent(looks: Iterable[Look]) -> list[Look]:
    """The ranks that the others wait for, as far as `looks` tell: those that are stopped; else, of those that have
    neither failed nor ended though the others have given up, the ones with the fewest steps done."""
    looks = list(looks)
    fewest = min((seen.step for seen in looks), default=0)
    return [seen for seen in looks if seen.stopped] or [seen for seen in looks if seen.step == fewest]
