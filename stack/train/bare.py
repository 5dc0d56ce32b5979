"""Work of ranks that a bare launcher started, without a driver: make the run directory, and notice `stack stop`."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from stack import errors
from stack.checkpoint import room
from stack.config.schema import Config
from stack.data.manifest import locate
from stack.errors import StackError
from stack.health.stopped import SIGNALLED
from stack.plan.layout import Plan
from stack.train import rundir, stop_request
from stack.train.lock import RunLock
from stack.train.rundir import RunDir
from stack.train.stop_request import StopRequests


def agree_on_run(cfg: Config, plan: Plan, rank: int, run: RunDir | None, held: contextlib.ExitStack) -> RunDir:
    """Rank 0 finds the corpus, makes a run directory or begins another attempt in `run`, and sends the path to the
    other ranks. Only rank 0 does this, since hundreds of ranks must not each list a corpus of many files. Collective.

    Args:
        cfg: the config.
        plan: the layout.
        rank: this rank.
        run: the run directory of `--config`, or None for a new run.
        held: keeps rank 0's lock of the run directory.

    Raises:
        StackError: the error of rank 0, on every rank: the corpus is not prepared, another process works in the run
            directory, or no checkpoint can be written.
    """
    from stack.parallel import messages, zero

    # The ranks connect first, so that an unreachable host leaves no run directory behind.
    zero.init_distributed(timeout=timedelta(seconds=cfg.health.hang_timeout_s))
    made, failure = None, None
    if rank == 0:
        try:
            made = _make(cfg, plan, run, held)
        except StackError as error:
            failure = (type(error).__name__, str(error))
    failure, path = messages.broadcast([failure, str(made.path) if made else None])
    if failure:
        zero.close()
        kind, message = failure
        raise getattr(errors, kind)(message)
    return RunDir(Path(path))


def _make(cfg: Config, plan: Plan, run: RunDir | None, held: contextlib.ExitStack) -> RunDir:
    corpus = locate(cfg.data, seed=cfg.data.split_seed)
    if run is None:
        room.check(cfg, plan)
        run = rundir.create(cfg, plan, corpus=corpus)
        held.enter_context(RunLock(run.path))
    else:
        held.enter_context(RunLock(run.path))
        room.check(cfg, plan, run.path)
        stop_request.clear(run)
        rundir.begin_again(run, cfg, plan, corpus=corpus)
    return run


def hears_stop(run: RunDir, asked: Callable[[], bool], *, saves: bool) -> Callable[[], bool]:
    """A function for rank 0 that the loop calls after each step: whether the run was asked to save and end, by a signal
    to this rank (`asked`) or by `stack stop`. It is enough that one rank is asked.

    Args:
        run: the run directory.
        asked: whether a signal asked this rank to end.
        saves: whether the run has checkpoints; without them `stack stop` ends the run at once.
    """
    requests = StopRequests(run)

    def heard() -> bool:
        wanted = requests.poll()
        if wanted == "now" or (wanted and not saves):
            stop_request.clear(run)
            told = {"type": "Interrupted", "message": "stopped by stack stop", "exit_code": SIGNALLED + signal.SIGINT}
            rundir.write_json(run.failed, {**told, "time": time.time()})
            # Ends this rank without another collective; the launcher then ends the other ranks.
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        elif wanted:
            stop_request.clear(run)
        return asked() or wanted is not None

    return heard
