"""How a rank that cannot go on ends: the cause in words that help, where the driver or the user finds them."""

import contextlib
import os
import socket
import sys
import time
import traceback
from typing import Any

from stack.config.schema import Config
from stack.errors import HangError, RankFailure, StackError
from stack.health.cause import WAITED, cause_of, is_collective_timeout, is_out_of_memory
from stack.health.orphan import AGENT_PID
from stack.plan.layout import Plan
from stack.train import rundir
from stack.train.memory import out_of_memory
from stack.train.progress import look
from stack.train.ranks import Launched
from stack.train.rundir import RunDir


def explained(error: Exception, cfg: Config | None, plan: Plan | None) -> BaseException:
    """What the user is to read of an error: not where it came up, but what happened, and what helps."""
    cause = cause_of(error)
    if isinstance(cause, StackError):
        return cause
    if is_out_of_memory(cause):
        return out_of_memory(cause, cfg, plan)
    if is_collective_timeout(cause):
        return HangError(f"{WAITED} {_timeout_of(str(cause), cfg)}: {cause}")
    return cause


def _timeout_of(words: str, cfg: Config | None) -> str:
    """The key that bounded a wait. gloo says how long it was; only the group that waits for disks has its own bound."""
    disks_s = cfg.checkpoint.timeout_s if cfg and cfg.checkpoint.timeout_s != cfg.health.hang_timeout_s else None
    return "checkpoint.timeout_s" if disks_s and f" {disks_s * 1000:.0f}ms" in words else "health.hang_timeout_s"


def failed(run: RunDir | None, launched: Launched, error: Exception, cause: BaseException) -> int:
    """Leaves the cause where the driver finds it and the traceback of the error in the log; returns the exit code."""
    exit_code = cause.exit_code if isinstance(cause, StackError) else RankFailure.exit_code
    # The launcher's output may go to a full disk, or to nobody.
    with contextlib.suppress(OSError):
        if run is not None or not isinstance(cause, StackError):
            traceback.print_exception(error)
            if cause is not error:
                print(f"{type(cause).__name__}: {cause}", file=sys.stderr)
        elif launched.local_rank == 0:
            # One line a host: a config is wrong on all of them.
            print(f"{type(cause).__name__}: {cause} (on {socket.gethostname()})", file=sys.stderr)
    if run is None:
        return exit_code
    told: dict[str, Any] = {
        "rank": launched.rank,
        "type": type(cause).__name__,
        "message": str(cause) or type(cause).__name__,
        "exit_code": exit_code,
        "time": time.time(),
    }
    has_driver = AGENT_PID in os.environ
    if not has_driver and exit_code == HangError.exit_code and (stopped := _stopped_here(run)):
        told["message"] = f"{stopped}; {told['message']}"
    rundir.write_last(run.rank(launched.rank) / "error.json", told)
    if not has_driver:
        # Without a driver the ranks themselves say how the run ended.
        rundir.record_end(run, told)
    return exit_code


def _stopped_here(run: RunDir) -> str:
    """Ranks of this host that are stopped: nobody else is there to look why ranks hang."""
    ranks_ = [int(folder.name) for folder in run.path.glob("ranks/*") if folder.name.isdigit()]
    stopped = [str(seen) for seen in look(run, sorted(ranks_)) if seen.stopped]
    return f"{', '.join(stopped)} is stopped (SIGSTOP, or a debugger)" if stopped else ""
