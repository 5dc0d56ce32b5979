"""Finds out why a run ended early: which rank failed first, from the reports of all hosts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stack.errors import HangError, RankFailure
from stack.health.cause import WAITED
from stack.health.lost_peer import is_lost_peer
from stack.train.progress import Look, absent


@dataclass(frozen=True)
class Failure:
    """Why a run ended early. Is written to FAILED.json or SAVED.json."""

    type: str
    message: str
    exit_code: int
    rank: int | None = None
    host: str | None = None
    time: float = field(default_factory=time.time, compare=False)
    """When the driver learned of the failure, in Unix seconds. The end of the other ranks comes later."""


@dataclass(frozen=True)
class Ended:
    """A rank that has ended, as its host saw it."""

    rank: int
    pid: int | None
    """None if the rank never wrote rank.json."""
    outcome: str | None
    """`done`, `error`, `stopped` by a signal, or None: the rank wrote nothing, as after SIGKILL."""
    error: dict[str, Any] | None = None
    """Content of its error.json."""
    hung: bool = False
    """NCCL's watchdog aborted the process, which could then not write error.json."""


@dataclass(frozen=True)
class Report:
    """What a host's agent saw when all its ranks had ended, or the first of them had failed."""

    host: str
    started: int
    """Number of ranks that were started there."""
    ranks: list[Ended]
    """The ranks that have ended."""
    launcher: int | None
    """Exit code of the launcher; None while it was still running."""
    looks: list[Look] = field(default_factory=list)
    """When ranks hang: the ranks of the host that had neither failed nor ended."""

    @property
    def well(self) -> bool:
        """Whether the launcher has ended and every rank of the host is done."""
        done = [rank for rank in self.ranks if rank.outcome == "done"]
        return self.launcher is not None and len(done) == self.started


def first_failure(reports: Sequence[Report]) -> tuple[Failure | None, bool]:
    """The rank that failed first according to `reports`, and whether no other report can change the result.

    A rank that was killed writes no error. The errors of other ranks then say only that a rank is gone, or that their
    launcher stopped them.
    """
    ended = [(rank, report.host) for report in reports for rank in report.ranks]
    errors = sorted((rank.error["time"], rank.rank, host, rank.error) for rank, host in ended if rank.error)
    causes = [(error, host) for _, _, host, error in errors if not is_lost_peer(error["message"])]
    if causes:
        return _told(*causes[0]), True
    # A rank without rank.json may still be starting, or was stopped before it wrote the file. It did not crash.
    silent = [(rank, host) for rank, host in ended if rank.outcome is None and rank.pid is not None]
    if hung := next(((rank, host) for rank, host in silent if rank.hung), None):
        rank, host = hung
        message = f"{WAITED} health.hang_timeout_s: NCCL's watchdog gave up on a collective"
        return Failure("HangError", message, HangError.exit_code, rank.rank, host), True
    if silent:
        rank, host = silent[0]
        message = f"process {rank.pid} was killed or crashed without a Python error (out of memory?)"
        return Failure("RankFailure", message, RankFailure.exit_code, rank.rank, host), True
    if errors:
        _, _, host, error = errors[0]
        return _told(error, host), False
    unwell = [report for report in reports if not report.well]
    return (_stopped(unwell[0]) if unwell else None), False


def blamed(failure: Failure, looks: Sequence[Look]) -> Failure:
    """The failure of a hang, with the rank that the others wait for. A rank that gave up cannot say which rank that is.

    Args:
        looks: the states of the ranks of all hosts.
    """
    missing = absent(looks)
    if not missing or not failure.message.startswith(WAITED):
        return failure
    first = missing[0]
    state = "is stopped (SIGSTOP, or a debugger)" if first.stopped else "does not answer; its log has its Python stack"
    others = ", ".join(f"rank {seen.rank} on {seen.host}" for seen in missing[1:4])
    also = f"; the same holds for {others}" if others else ""
    message = (
        f"process {first.pid} on {first.host} {state}, {first.phase} after step {first.step}{also}; "
        f"rank {failure.rank} gave up: {failure.message}"
    )
    return replace(failure, message=message, rank=first.rank, host=first.host)


def _told(error: dict[str, Any], host: str) -> Failure:
    return Failure(error["type"], error["message"], error["exit_code"], error["rank"], host)


def _stopped(report: Report) -> Failure:
    """The failure of a host whose ranks were stopped or never started, though no rank reported an error."""
    if report.launcher is None:
        message = f"rank {report.ranks[0].rank} was stopped by SIGTERM from outside"
    else:
        message = f"the launcher ended with exit code {report.launcher} before the run was done"
    return Failure("RankFailure", message, RankFailure.exit_code, None, report.host)
