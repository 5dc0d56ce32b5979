"""`stack train`: plan, prepare, launch, follow, tell how it ended."""

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from stack.config.compose import compose
from stack.config.schema import Config
from stack.data import shards
from stack.errors import StackError
from stack.launch.backends import deepspeed
from stack.launch.follow import SIGNALLED, Failure, follow
from stack.launch.processes import stop
from stack.observe.console import Console
from stack.plan.layout import Plan, make_plan
from stack.plan.report import render
from stack.train import rundir
from stack.train.inputs import open_batches
from stack.train.rundir import RunDir


def train(overrides: Sequence[str]) -> int:
    """Runs one training from Hydra overrides and returns the exit code.

    Raises:
        StackError: the config, the layout or the data are wrong; nothing was started.
    """
    cfg = compose(overrides)
    plan = make_plan(cfg)
    deepspeed.check(plan)
    corpus = shards.prepare(cfg.data, seed=cfg.data.split_seed)
    open_batches(cfg, plan, corpus)
    with _stop_requests() as requests:
        run = rundir.create(cfg, plan, corpus=corpus)
        console = Console(cfg.train.steps, log_every=cfg.train.log_every)
        try:
            print(render(plan, cfg), end="\n\n")
            console.start(f"run {run.path}")
            failure = _run(cfg, plan, run, console, requests)
        except BrokenPipeError:
            failure = Failure("Interrupted", "nobody reads the output any more", SIGNALLED + signal.SIGPIPE)
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
        return follow(launcher, run, console, requests, grace_s=cfg.launch.grace_s)
    finally:
        stop(launcher, grace_s=cfg.launch.grace_s)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
