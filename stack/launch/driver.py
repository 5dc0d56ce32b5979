"""`stack train`: plan, prepare, launch, follow, tell how it ended."""

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stack.config.compose import compose
from stack.config.schema import Config
from stack.data import shards
from stack.errors import RankFailure, StackError
from stack.launch.backends import deepspeed
from stack.launch.processes import Rank, local_ranks, stop
from stack.observe.console import Console
from stack.observe.jsonl import Follower
from stack.plan.layout import Plan, make_plan
from stack.plan.report import render
from stack.train import rundir
from stack.train.rundir import RunDir

#: What a shell adds to the number of the signal that ended a command: Ctrl-C is 130.
_SIGNALLED = 128
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


def train(overrides: Sequence[str]) -> int:
    """Runs one training from Hydra overrides and returns the exit code.

    Raises:
        StackError: the config, the layout or the data are wrong; nothing was started.
    """
    cfg = compose(overrides)
    plan = make_plan(cfg)
    deepspeed.check(plan)
    corpus = shards.prepare(cfg.data, seed=cfg.data.split_seed)
    with _stop_requests() as requests:
        run = rundir.create(cfg, plan, corpus=corpus)
        console = Console(cfg.train.steps, log_every=cfg.train.log_every)
        try:
            print(render(plan, cfg), end="\n\n")
            console.start(f"run {run.path}")
            failure = _run(cfg, plan, run, console, requests)
        except BrokenPipeError:
            failure = Failure("Interrupted", "nobody reads the output any more", _SIGNALLED + signal.SIGPIPE)
        except Exception as error:
            _record(run, Failure(type(error).__name__, f"stack train failed: {error}", StackError.exit_code))
            raise
        finally:
            with contextlib.suppress(OSError):
                console.close()
        return _close(run, console, failure)


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[signal.Signals]]:
    """The signals that asked the run to end, as they come in. They interrupt nothing: however often and whenever a
    user asks, the run is stopped in good order. One that was ignored (nohup) stays ignored."""
    requests: list[signal.Signals] = []
    heard = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    previous = {s: signal.signal(s, lambda number, _: requests.append(signal.Signals(number))) for s in heard}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run(cfg: Config, plan: Plan, run: RunDir, console: Console, requests: list[signal.Signals]) -> Failure | None:
    """Starts the ranks, shows the run until it ends, and leaves no process behind."""
    console.note(f"starting {plan.world_size} ranks with the deepspeed launcher")
    command = deepspeed.command(run, plan, port=free_port())
    with run.launcher_log.open("wb") as log:
        # A session of its own: Ctrl-C reaches the driver alone, which then stops the ranks in good order.
        launcher = subprocess.Popen(
            command,
            env=deepspeed.environment(plan),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        return _follow(launcher, run, console, requests, grace_s=cfg.launch.grace_s)
    finally:
        stop(launcher, grace_s=cfg.launch.grace_s)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _follow(
    launcher: subprocess.Popen, run: RunDir, console: Console, requests: list[signal.Signals], *, grace_s: float
) -> Failure | None:
    """Shows the run until it ends. The outcome is DONE.json; a launcher's exit code has been seen to lie."""
    metrics = Follower(run.metrics)
    ranks: dict[int, Rank] = {}
    while True:
        ranks = local_ranks(run, ranks)
        running = launcher.poll() is None
        failure = _first_failure(run, ranks)
        # A terminal that was closed takes no lines.
        for record in [] if requests else metrics.poll():
            console.step(record)
        if failure or requests or not running or _is_overdue(run, grace_s):
            break
        time.sleep(_POLL_S)
    if failure or run.done.exists():
        return failure
    if requests:
        return Failure("Interrupted", f"stopped by {_name(requests[0])}", _SIGNALLED + requests[0])
    return Failure(
        "RankFailure",
        f"the launcher ended with {launcher.returncode} before the run was done: {_last_line(run.launcher_log)}",
        RankFailure.exit_code,
    )


def _is_overdue(run: RunDir, grace_s: float) -> bool:
    """Whether the run is done, and yet some process of it does not end."""
    return run.done.exists() and time.time() - run.done.stat().st_mtime > grace_s


def _name(number: signal.Signals) -> str:
    return "Ctrl-C" if number == signal.SIGINT else number.name


def _first_failure(run: RunDir, ranks: dict[int, Rank]) -> Failure | None:
    """The rank that failed first. One that was killed leaves neither error.json nor done.json, and what its
    neighbours then write is only that it is gone."""
    dead = [rank for rank in ranks.values() if not rank.alive]
    errors = run.errors()
    silent = [rank for rank in dead if not run.has_outcome(rank.rank)]
    causes = [error for error in errors if not _is_lost_peer(error)]
    if run.done.exists():
        return None
    if causes:
        return _told(causes[0])
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


def _close(run: RunDir, console: Console, failure: Failure | None) -> int:
    """Writes FAILED.json if need be, tells the user, and returns the exit code."""
    if failure is None or run.done.exists():
        console.close(f"done: {run.path}\ncurve: {run.curve}")
        return 0
    _record(run, failure)
    where = run.launcher_log if failure.rank is None else run.rank(failure.rank) / "log.txt"
    culprit = "" if failure.rank is None else f"rank {failure.rank}: "
    first_line = failure.message.strip().splitlines()[0]
    # The reader of the output may have ended first, by the same Ctrl-C.
    with contextlib.suppress(OSError):
        console.close(f"{failure.type}: {culprit}{first_line}\nlog: {where}")
    return failure.exit_code


def _record(run: RunDir, failure: Failure) -> None:
    rundir.write_json(run.failed, {**asdict(failure), "time": time.time()})
