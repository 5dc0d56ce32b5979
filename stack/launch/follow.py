"""Following a run: its rows to the screen, and which rank failed first."""

import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stack.errors import HangError, RankFailure
from stack.health.stopped import SIGNALLED
from stack.launch.processes import Rank, local_ranks
from stack.observe.console import Console
from stack.observe.jsonl import Follower, Tail
from stack.train.rundir import RunDir

_POLL_S = 0.2
#: How gloo, NCCL and the store say that the other side of a connection is gone.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "remote process exiting prematurely",
)


@dataclass(frozen=True)
class Failure:
    """Why a run ended early; becomes FAILED.json."""

    type: str
    message: str
    exit_code: int
    rank: int | None = None


def follow(
    launcher: subprocess.Popen, run: RunDir, console: Console, requests: list[signal.Signals], *, grace_s: float
) -> Failure | None:
    """Shows the run until it ends. The outcome is DONE.json; a launcher's exit code has been seen to lie."""
    # Of earlier attempts the user has seen the rows.
    metrics, notes = Follower(run.metrics, from_end=True), Tail(run.notes, from_end=True)
    ranks: dict[int, Rank] = {}
    while True:
        ranks = local_ranks(run, ranks)
        running = launcher.poll() is None
        failure = _first_failure(run, ranks)
        # A terminal that was closed takes no lines.
        if not requests:
            _show(notes, metrics, console)
        if failure or requests or not running or _is_overdue(run, grace_s):
            break
        time.sleep(_POLL_S)
    if failure or run.done.exists():
        return failure
    if requests:
        return Failure("Interrupted", f"stopped by {_name(requests[0])}", SIGNALLED + requests[0])
    return Failure(
        "RankFailure",
        f"the launcher ended with {launcher.returncode} before the run was done: {_last_line(run.launcher_log)}",
        RankFailure.exit_code,
    )


def _show(notes: Tail, metrics: Follower, console: Console) -> None:
    for line in notes.poll():
        console.note(line.decode(errors="replace"))
    for record in metrics.poll():
        console.step(record)


def _is_overdue(run: RunDir, grace_s: float) -> bool:
    """Whether the run is done, and yet some process of it does not end."""
    return run.done.exists() and time.time() - run.done.stat().st_mtime > grace_s


def _name(number: signal.Signals) -> str:
    return "Ctrl-C" if number == signal.SIGINT else number.name


def _first_failure(run: RunDir, ranks: dict[int, Rank]) -> Failure | None:
    """The rank that failed first. One that was killed leaves no word of its own; what its neighbours then write is only
    that it is gone, or that their launcher stopped them."""
    dead = [rank for rank in ranks.values() if not rank.alive]
    errors = run.errors()
    silent = [rank for rank in dead if not run.has_outcome(rank.rank)]
    causes = [error for error in errors if not _is_lost_peer(error)]
    if run.done.exists():
        return None
    if causes:
        return _told(causes[0])
    hung = next((rank for rank in silent if _was_hung(run.rank(rank.rank) / "log.txt")), None)
    if hung:
        return Failure("HangError", "NCCL's watchdog gave up on a collective", HangError.exit_code, hung.rank)
    if silent:
        return Failure(
            "RankFailure",
            f"process {silent[0].pid} was killed or crashed without a Python error (out of memory?)",
            RankFailure.exit_code,
            silent[0].rank,
        )
    # The lost rank itself may need a moment more to be seen dead.
    if errors and time.time() - errors[0]["time"] > _POLL_S:
        return _told(errors[0])
    return None


def _was_hung(log: Path) -> bool:
    """Whether NCCL's watchdog ended the rank; it aborts the process, which then can tell nothing itself."""
    return log.exists() and "Watchdog caught collective operation timeout" in log.read_text(errors="replace")


def _told(error: dict[str, Any]) -> Failure:
    return Failure(error["type"], error["message"], error["exit_code"], error["rank"])


def _is_lost_peer(error: dict[str, Any]) -> bool:
    """Whether the error only says that another rank went away."""
    return any(words in error["message"] for words in _LOST_PEER)


def _last_line(log: Path) -> str:
    """What was printed last, the launcher's own account of what it starts and stops left out."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    told = [line for line in lines if line and "[launch.py:" not in line and "[runner.py:" not in line]
    return told[-1] if told else "it printed no error"
