"""The state of a run, from the files in its directory. The run may be on another host, and its files may be damaged."""

import time
from dataclasses import dataclass
from pathlib import Path

from stack.train.lock import LOCK, Holder
from stack.train.rundir import RunDir, read_json

RUNNING, DONE, SAVED, FAILED, ENDED = "running", "done", "saved", "failed", "ended"
#: A lock of another host that was not renewed for this time belongs to a process that is gone.
_STALE_S = 60.0
_WORDS = 200


@dataclass(frozen=True)
class Standing:
    """The state of a run."""

    state: str
    """`running`, `done`, `saved` on request, `failed`; or `ended` without a result, as after SIGKILL."""
    why: str = ""
    """The reason in one line, or an empty string."""
    exit_code: int = 0

    def __str__(self) -> str:
        return f"{self.state}: {self.why}" if self.why else self.state


def standing(run: RunDir, me: Holder) -> Standing:
    """The state of a run.

    Args:
        me: this process, which sees the other processes of its host.
    """
    if run.done.exists():
        return Standing(DONE)
    for state, file in ((SAVED, run.saved), (FAILED, run.failed)):
        if file.exists():
            return _told(state, file)
    if holder := at_work(run, me):
        return Standing(RUNNING, one_line(f"process {holder.pid} on {holder.host}"))
    return Standing(ENDED, "it wrote no result: the process was killed, or its host went down")


def at_work(run: RunDir, me: Holder) -> Holder | None:
    """The process that works in a run directory, or None."""
    file = run.path / LOCK
    try:
        holder = Holder(**(read_json(file) or {}))
        age_s = time.time() - file.stat().st_mtime
        gone = holder.is_gone if holder.place == me.place else age_s > _STALE_S
    except (OSError, ValueError, TypeError):
        # There is no lock, or a damaged one.
        return None
    return None if gone else holder


def _told(state: str, file: Path) -> Standing:
    try:
        told = read_json(file) or {}
        kind, message, exit_code = told["type"], told["message"], int(told["exit_code"])
        rank = "" if told.get("rank") is None else f"rank {told['rank']}: "
        who = f"{kind}: {rank}" if state == FAILED else ""
        return Standing(state, one_line(f"{who}{message}"), exit_code)
    except (OSError, ValueError, TypeError, KeyError):
        return Standing(state, f"{file.name} is damaged", 1)


def one_line(text: str) -> str:
    """The first line, without control characters: the content of a file must not control the terminal."""
    first = (text.strip().splitlines() or [""])[0][:_WORDS]
    return "".join(letter if letter.isprintable() else "?" for letter in first)
