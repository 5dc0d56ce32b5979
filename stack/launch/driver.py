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

import psutil

from stack.config.compose import compose
from stack.data import shards
from stack.errors import RankFailure
from stack.launch.backends import deepspeed
from stack.launch.processes import Rank, local_ranks, stop
from stack.observe.console import Console
from stack.observe.jsonl import Follower
from stack.plan.layout import make_plan
from stack.plan.report import render
from stack.train import rundir
from stack.train.rundir import RunDir

#: What a shell reports for a command ended by Ctrl-C.
INTERRUPTED = 130
_POLL_S = 0.2


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
    corpus = shards.prepare(cfg.data, seed=cfg.data.split_seed)
    run = rundir.create(cfg, plan, corpus=corpus)
    console = Console(cfg.train.steps, log_every=cfg.train.log_every)
    print(render(plan, cfg), end="\n\n")
    console.start(f"run {run.path}")
    console.note(f"starting {plan.world_size} ranks with the deepspeed launcher")
    command = deepspeed.command(run, plan, port=free_port())
    with _started(command, deepspeed.environment(plan), run, grace_s=cfg.launch.grace_s) as (launcher, ranks):
        failure = _follow(launcher, ranks, run, console)
    return _close(run, console, failure)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _started(
    command: list[str], environment: dict[str, str], run: RunDir, *, grace_s: float
) -> Iterator[tuple[psutil.Popen, dict[int, Rank]]]:
    """The running launcher, and the ranks of this host as they come up. Leaves no process behind, however it ends."""
    with run.launcher_log.open("wb") as log:
        # A session of its own: Ctrl-C reaches the driver alone, which then stops the ranks in good order.
        launcher = psutil.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    ranks: dict[int, Rank] = {}
    try:
        yield launcher, ranks
    finally:
        # A second Ctrl-C must not leave ranks behind.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop(launcher, local_ranks(run, ranks), grace_s=grace_s)
        signal.signal(signal.SIGINT, previous)


def _follow(launcher: psutil.Popen, ranks: dict[int, Rank], run: RunDir, console: Console) -> Failure | None:
    """Shows the run until it ends. The outcome is DONE.json; a launcher's exit code has been seen to lie."""
    metrics = Follower(run.metrics)
    try:
        while True:
            ranks.update(local_ranks(run, ranks))
            running = launcher.poll() is None
            failure = _first_failure(run, ranks)
            for record in metrics.poll():
                console.step(record)
            if failure or not running:
                break
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        return Failure("Interrupted", "stopped by Ctrl-C", INTERRUPTED)
    if failure is None and not run.done.exists():
        return Failure(
            "RankFailure",
            f"the launcher ended with {launcher.returncode} before the run was done: {_last_line(run.launcher_log)}",
            RankFailure.exit_code,
        )
    return failure


def _first_failure(run: RunDir, ranks: dict[int, Rank]) -> Failure | None:
    """The rank that failed first. One that was killed leaves no error.json, and what its neighbours then write is
    only that it is gone."""
    if run.done.exists():
        return None
    dead = [rank for rank in ranks.values() if not rank.alive]
    errors = run.errors()
    if not dead and not errors:
        return None
    silent = [rank for rank in dead if not (run.rank(rank.rank) / "error.json").exists()]
    lost = [error for error in errors if not _is_lost_peer(error)]
    if lost or not silent:
        first = (lost or errors)[0]
        return Failure(first["type"], first["message"], first["exit_code"], first["rank"])
    if run.done.exists():
        return None
    rank = silent[0]
    return Failure(
        "RankFailure",
        f"process {rank.process.pid} was killed or crashed without a Python error (out of memory?)",
        RankFailure.exit_code,
        rank.rank,
    )


def _is_lost_peer(error: dict[str, Any]) -> bool:
    """Whether the error only says that another rank went away."""
    return any(word in error["message"] for word in ("Connection closed by peer", "Connection reset by peer"))


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _close(run: RunDir, console: Console, failure: Failure | None) -> int:
    if failure is None:
        console.close(f"done: {run.path}\ncurve: {run.curve}")
        return 0
    rundir.write_json(run.failed, {**asdict(failure), "time": time.time()})
    where = run.launcher_log if failure.rank is None else run.rank(failure.rank) / "log.txt"
    culprit = "" if failure.rank is None else f"rank {failure.rank}: "
    first_line = failure.message.strip().splitlines()[0]
    console.close(f"{failure.type}: {culprit}{first_line}\nlog: {where}")
    return failure.exit_code
