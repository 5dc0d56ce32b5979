"""`stack train`: plan, prepare, launch, follow, and report the end. The other verbs that start ranks use `launch`."""

import contextlib
import os
import shlex
import signal
import socket
from collections.abc import Sequence
from dataclasses import asdict

from stack.checkpoint import manifest, room
from stack.config.compose import compose
from stack.config.places import settled
from stack.config.schema import Config
from stack.errors import Requeue, StackError
from stack.health.stopped import SIGNALLED
from stack.launch import backends
from stack.launch.agents import SILENCE_S, agents
from stack.launch.follow import follow, interrupted
from stack.launch.hosts import Host, forwarded
from stack.launch.order import Order
from stack.launch.place import Place, meet
from stack.launch.reread import prepared
from stack.launch.signals import Requests, stop_requests
from stack.launch.verdict import Failure
from stack.observe.console import Console
from stack.plan.layout import Plan, make_plan
from stack.plan.report import render
from stack.train import rundir, stop_request
from stack.train.lock import RunLock
from stack.train.rundir import RunDir

#: Names of the backends in messages.
_STARTERS = {"deepspeed": "the deepspeed launcher", "torchrun": "torchrun", "slurm": "srun", "local": "no launcher"}


def train(overrides: Sequence[str]) -> int:
    """Runs one training from Hydra overrides and returns the exit code.

    Raises:
        StackError: the config, the layout or the data are wrong; nothing was started.
    """
    cfg = settled(compose(overrides))
    plan = plan_of(cfg)
    corpus = prepared(cfg, plan)
    check_weights(cfg)
    room.check(cfg, plan)
    with stop_requests() as requests:
        run = rundir.create(cfg, plan, corpus=corpus)
        with RunLock(run.path):
            return launch(cfg, plan, run, requests)


def check(cfg: Config, run: RunDir) -> int:
    """Starts the ranks of a run directory that `rundir.create_check` made, and returns the exit code.

    Raises:
        LayoutError: this driver cannot start the ranks.
    """
    with stop_requests() as requests:
        return launch(cfg, plan_of(cfg), run, requests)


def plan_of(cfg: Config) -> Plan:
    plan = make_plan(cfg)
    backends.check(cfg, plan)
    return plan


def check_weights(cfg: Config) -> None:
    """Downloads pretrained weights from the hub, and refuses weights whose names and shapes are not those of the model,
    before ranks are started."""
    if cfg.model.init == "pretrained":
        from stack.models.build import open_weights

        weights = open_weights(cfg)
        assert weights is not None
        weights.check_shapes()


def launch(cfg: Config, plan: Plan, run: RunDir, requests: list[signal.Signals]) -> int:
    """Starts the ranks, follows them to their end, and returns the exit code.

    Args:
        requests: signals that asked this process to end, as they come in.
    """
    asked = Requests(requests, run)
    console = Console(cfg.train.steps, log_every=cfg.train.log_every)
    try:
        print(render(plan, cfg) if run.trains else plan.summary, end="\n\n")
        console.start(f"run {run.path}")
        if run.trains:
            how = f"stack stop {shlex.quote(str(run.path))}"
            console.note(f"process {os.getpid()} on {socket.gethostname()}; stop the run with: {how}")
        failure = _follow(cfg, plan, run, console, asked)
    except BrokenPipeError:
        failure = Failure("Interrupted", "the reader of the output is gone", SIGNALLED + signal.SIGPIPE)
    except StackError as error:
        # After a request to end, hosts that did not answer in time have no fault.
        found = asked.poll()
        failure = interrupted(found[0]) if found else Failure(type(error).__name__, str(error), error.exit_code)
    except Exception as error:
        _record(run, Failure(type(error).__name__, f"stack failed: {error}", StackError.exit_code))
        raise
    finally:
        with contextlib.suppress(OSError):
            console.close()
        with contextlib.suppress(OSError):
            stop_request.clear(run)
    return _close(cfg, run, console, failure)


def _follow(cfg: Config, plan: Plan, run: RunDir, console: Console, requests: Requests) -> Failure | None:
    """Starts the ranks, shows the run until it ends, and leaves no process behind."""
    place = meet(cfg, plan, run.path, requests.signals)
    if asked := requests.poll():
        return interrupted(asked[0])
    console.note(f"starting {plan.world_size} ranks with {_STARTERS[cfg.launch.backend]} on {place.shown}")
    orders = [(host, _order(cfg, run, place, node)) for node, host in enumerate(place.hosts)]
    with agents(orders, run) as started:
        saves = cfg.checkpoint.every > 0 and run.trains
        failure = follow(started, run, console, requests, grace_s=cfg.launch.grace_s, saves=saves)
        if failure and failure.rank is not None and failure.exit_code != Requeue.exit_code:
            # A rank that does not react to signals keeps the user waiting for up to launch.grace_s.
            with contextlib.suppress(OSError):
                console.note(f"rank {failure.rank} failed; ending the other ranks")
        return failure


def _order(cfg: Config, run: RunDir, place: Place, node: int) -> Order:
    """The order for host number `node`."""
    host, first = place.hosts[node], sum(host.slots for host in place.hosts[:node])
    return Order(
        run=str(run.path),
        host=host.name,
        ranks=list(range(first, first + host.slots)),
        commands=backends.COMMANDS[cfg.launch.backend](place, run, node),
        environment=_environment(cfg, host, place.interfaces[node]),
        grace_s=cfg.launch.grace_s,
        # When a connection breaks, the other end of ssh may not notice for a long time.
        silence_s=None if host.here else SILENCE_S,
    )


def _environment(cfg: Config, host: Host, interface: str | None) -> dict[str, str]:
    """Variables that are added to a host's own: those of `launch.env`, and the network interface to the other hosts."""
    given = {} if host.here else forwarded(os.environ, cfg.launch.env)
    if interface is None:
        return given
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {**{name: interface for name in names if name not in os.environ}, **given}


def _close(cfg: Config, run: RunDir, console: Console, failure: Failure | None) -> int:
    """Writes FAILED.json or SAVED.json if the run has no DONE.json, tells the user, and returns the exit code."""
    if failure is None or run.done.exists():
        console.close(_told(run))
        return 0
    _record(run, failure)
    culprit, where = "", ""
    if failure.exit_code == Requeue.exit_code:
        where = _curve(run)
    elif failure.rank is not None:
        culprit, where = f"rank {failure.rank}: ", f"\nlog: {run.rank(failure.rank) / 'log.txt'}"
    elif failure.host is not None:
        where = f"\nlog: {run.launcher_log(failure.host)}"
    elif failure.type == "Interrupted" and run.trains:
        kept = manifest.steps(manifest.root_of(cfg.checkpoint.path, run.path))
        where = (
            f"\nto go on from step {kept[-1]}: {run.resume_command}" if kept else f"; nothing was saved in {run.path}"
        )
    first_line = failure.message.strip().splitlines()[0]
    # The same Ctrl-C may have ended the reader of the output.
    with contextlib.suppress(OSError):
        kind = "" if failure.exit_code == Requeue.exit_code else f"{failure.type}: "
        console.close(f"{kind}{culprit}{first_line}{where}")
    return failure.exit_code


def _told(run: RunDir) -> str:
    """The last lines of a run that went well."""
    result = rundir.read_json(run.result)
    if result is None:
        return f"done: {run.path}{_curve(run)}"
    if run.check.exists():
        return result["told"]
    return (
        f"held-out loss {result['heldout_loss']:.6f} nats, perplexity {result['perplexity']:.4f}, over "
        f"{result['tokens']:,} tokens in {result['sequences']:,} of {result['of_sequences']:,} sequences\n"
        f"of: {result['weights']}"
    )


def _curve(run: RunDir) -> str:
    """A line with the path of the picture, or nothing if there is none."""
    return f"\ncurve: {run.curve}" if run.curve.exists() else ""


def _record(run: RunDir, failure: Failure) -> None:
    rundir.write_last(run.ended_early(failure.exit_code), asdict(failure))
