"""Ends a rank after an error: turns the error into a message for the user, and writes it where the driver reads it."""

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
    """The error to report to the user: the cause of `error`, as a `StackError` with advice where the cause is known.

    Args:
        error: the exception that ended the rank.
        cfg: the config, if it was read before the error.
        plan: the layout, if it was made before the error.
    """
    cause = cause_of(error)
    if isinstance(cause, StackError):
        return cause
    if is_out_of_memory(cause):
        return out_of_memory(cause, cfg, plan)
    if is_collective_timeout(cause):
        return HangError(f"{WAITED} {_timeout_of(str(cause), cfg)}: {cause}")
    return cause


def _timeout_of(words: str, cfg: Config | None) -> str:
    """The config key of the timeout that passed, found by its length in gloo's message. Only `Mesh.disk_group` has a
    timeout of its own."""
    disks_s = cfg.checkpoint.timeout_s if cfg and cfg.checkpoint.timeout_s != cfg.health.hang_timeout_s else None
    return "checkpoint.timeout_s" if disks_s and f" {disks_s * 1000:.0f}ms" in words else "health.hang_timeout_s"


def failed(run: RunDir | None, launched: Launched, error: Exception, cause: BaseException) -> int:
    """Writes the cause to the rank's error.json for the driver, and the traceback of the error to the log. Returns the
    exit code.

    Args:
        run: the run directory, or None if the rank has none yet.
        launched: this rank's place.
        error: the exception that ended the rank.
        cause: the result of `explained`.
    """
    exit_code = cause.exit_code if isinstance(cause, StackError) else RankFailure.exit_code
    # The launcher's output may go to a full disk, or to a pipe that is closed.
    with contextlib.suppress(OSError):
        if run is not None or not isinstance(cause, StackError):
            traceback.print_exception(error)
            if cause is not error:
                print(f"{type(cause).__name__}: {cause}", file=sys.stderr)
        elif launched.local_rank == 0:
            # Only one rank of each host prints the line, since a wrong config is wrong for all ranks.
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
        # Without a driver the ranks write the file that says how the run ended.
        rundir.record_end(run, told)
    return exit_code


def _stopped_here(run: RunDir) -> str:
    """Names the ranks of this host that are stopped. Without a driver no other process looks for the reason of a
    hang."""
    ranks_ = [int(folder.name) for folder in run.path.glob("ranks/*") if folder.name.isdigit()]
    stopped = [str(seen) for seen in look(run, sorted(ranks_)) if seen.stopped]
    return f"{', '.join(stopped)} is stopped (SIGSTOP, or a debugger)" if stopped else ""
