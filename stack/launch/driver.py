"""`stack train`, `resume` and `eval`: plan, prepare, launch, follow, tell how it ended."""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from stack.checkpoint import manifest
from stack.config.compose import compose, from_yaml
from stack.config.places import settled
from stack.config.schema import Config
from stack.data import shards
from stack.errors import CheckpointError, Requeue, StackError, UsageError
from stack.health.stopped import SIGNALLED
from stack.launch import backends
from stack.launch.agent import Order
from stack.launch.agents import SILENCE_S, agents
from stack.launch.follow import follow, interrupted
from stack.launch.hosts import Host, forwarded
from stack.launch.place import Place, meet
from stack.launch.signals import stop_requests
from stack.launch.verdict import Failure
from stack.observe.console import Console
from stack.plan.layout import Plan, make_plan
from stack.plan.policies import state_names
from stack.plan.report import render
from stack.train import rundir
from stack.train.inputs import course, open_batches
from stack.train.lock import RunLock
from stack.train.lr import learning_rate
from stack.train.rundir import RunDir

#: A run's config in a folder that `stack export` wrote.
EXPORTED = "stack.yaml"
#: How the user reads who starts the ranks.
_STARTERS = {"deepspeed": "the deepspeed launcher", "torchrun": "torchrun", "slurm": "srun", "local": "no launcher"}
#: Folder of a run's evaluations, inside it.
EVALUATIONS = "evaluations"


def train(overrides: Sequence[str]) -> int:
    """Runs one training from Hydra overrides and returns the exit code.

    Raises:
        StackError: the config, the layout or the data are wrong; nothing was started.
    """
    cfg = settled(compose(overrides))
    plan = plan_of(cfg)
    corpus = _corpus(cfg, plan)
    _check_weights(cfg)
    with stop_requests() as requests:
        run = rundir.create(cfg, plan, corpus=corpus)
        with RunLock(run.path):
            return _launch(cfg, plan, run, requests)


def resume(run: RunDir, overrides: Sequence[str]) -> int:
    """Goes on with a run from its newest whole checkpoint, in the layout that the overrides ask for.

    Raises:
        StackError: as `train`; or the run is done, is at work, or its checkpoint is of another course of training.
    """
    before = from_yaml(run.config)
    # What an earlier resume was allowed, or told to begin with, was for that once.
    once = {"checkpoint.step": "auto", "checkpoint.allow": "[]"}
    given = [override.lstrip("+").partition("=")[0] for override in overrides]
    cfg = settled(from_yaml(run.config, [*(f"{k}={v}" for k, v in once.items() if k not in given), *overrides]))
    with RunLock(run.path):
        plan = plan_of(cfg)
        corpus = _corpus(cfg, plan, run.corpus if cfg.data == before.data else None)
        step = _check_goes_on(cfg, before, run, corpus)
        with stop_requests() as requests:
            rundir.begin_again(run, cfg, plan, corpus=corpus)
            if step and (note := jump(cfg, before, step)):
                with run.notes.open("a") as notes:
                    notes.write(f"{note}\n")
                print(note)
            return _launch(cfg, plan, run, requests)


def evaluate(folder: Path, overrides: Sequence[str]) -> int:
    """Held-out loss and perplexity of a run's checkpoint, or of a folder that `stack export` wrote.

    Raises:
        StackError: as `train`; or there is nothing to evaluate.
    """
    run = RunDir(folder)
    exported = (folder / EXPORTED).is_file()
    if exported and any(override.lstrip("+").startswith("checkpoint.step=") for override in overrides):
        raise UsageError(f"checkpoint.step: {folder} is an export of one checkpoint and has no others; drop it")
    cfg = settled(from_yaml(folder / EXPORTED if exported else run.config, newest(overrides)))
    checkpoints, known = None, None
    if exported:
        cfg = replace(cfg, model=replace(cfg.model, name=str(folder), init="pretrained"))
        parent = Path(cfg.run.root) / EVALUATIONS
    else:
        checkpoints, parent = manifest.root_of(cfg.checkpoint.path, run.path), folder / EVALUATIONS
        if not manifest.steps(checkpoints):
            raise CheckpointError(f"{folder} has saved no checkpoint to evaluate; train further, or save more often")
        known = run.corpus if cfg.data == from_yaml(run.config).data else None
    plan = plan_of(cfg)
    corpus = _corpus(cfg, plan, known)
    if checkpoints is None:
        _check_weights(cfg)
    with stop_requests() as requests:
        evaluation = rundir.create_evaluation(parent, cfg, plan, corpus=corpus, checkpoints=checkpoints)
        return _launch(cfg, plan, evaluation, requests)


def check(cfg: Config, run: RunDir) -> int:
    """Starts the ranks of a run directory that `rundir.create_check` made, and returns the exit code.

    Raises:
        LayoutError: this driver cannot start them.
    """
    with stop_requests() as requests:
        return _launch(cfg, plan_of(cfg), run, requests)


def newest(overrides: Sequence[str]) -> list[str]:
    """Overrides that look at the newest checkpoint unless they say another, whatever the run was resumed from."""
    named = any(override.lstrip("+").startswith("checkpoint.step=") for override in overrides)
    return list(overrides) if named else ["checkpoint.step=auto", *overrides]


def plan_of(cfg: Config) -> Plan:
    plan = make_plan(cfg)
    backends.check(cfg, plan)
    return plan


def _corpus(cfg: Config, plan: Plan, known: Path | None = None) -> Path:
    """The prepared corpus, found to fit: `known`, which a run has read before, or what the config asks for."""
    corpus = known if known and known.is_dir() else shards.prepare(cfg.data, seed=cfg.data.split_seed)
    open_batches(cfg, plan, corpus)
    return corpus


def _check_weights(cfg: Config) -> None:
    """Refuses pretrained weights that are not of the model before ranks are started for them, and downloads a hub's."""
    if cfg.model.init == "pretrained":
        from stack.models.build import open_weights

        open_weights(cfg)


def jump(cfg: Config, before: Config, step: int) -> str | None:
    """What becomes of the learning rate after `step` where a run goes on to another end, or with another schedule; None
    where it goes on as it would have."""

    def rate(of: Config, number: int) -> float:
        return learning_rate(number, of.train.steps, optim=of.optim, schedule=of.schedule)

    last, now = rate(before, step - 1), rate(cfg, step)
    if now == (rate(before, step) if step < before.train.steps else last):
        return None
    ends = f"{cfg.schedule.kind} schedule to step {cfg.train.steps} after one to {before.train.steps}"
    return f"{ends}: the learning rate goes from {last:.2e} to {now:.2e}; schedule=constant or wsd goes on evenly"


def _check_goes_on(cfg: Config, before: Config, run: RunDir, corpus: Path) -> int | None:
    """What can be refused before anything is changed. The ranks then read the checkpoint itself.

    Returns:
        The step of the checkpoint, as far as it can be seen from here; None where there is none.
    """
    root, old = (manifest.root_of(c.checkpoint.path, run.path) for c in (cfg, before))
    there = manifest.steps(root)
    if not there and root != old and manifest.steps(old):
        raise CheckpointError(f"{root} holds no checkpoint, {old} does; move that folder there, or keep its path")
    step = cfg.checkpoint.step
    manifest.check_step(step, there, where=root)
    for candidate in reversed(there) if step == "auto" else [step]:
        folder = manifest.folder_of(root, candidate)
        try:
            found = manifest.read(folder)
        except CheckpointError:
            # The ranks say what is wrong with it, and pass it over or end.
            continue
        if cfg.model != before.model:
            from stack.models.build import parameter_shapes

            manifest.check_same_model(found, parameter_shapes(cfg), where=folder)
        manifest.check_same_course(found, cfg, course(cfg, corpus), state_names(cfg), where=folder)
        if candidate >= cfg.train.steps:
            raise UsageError(
                f"{run.path} is at step {candidate} and train.steps={cfg.train.steps}: nothing is left to do; to go on "
                f"add train.steps={2 * candidate}"
            )
        return candidate
    return None


def _launch(cfg: Config, plan: Plan, run: RunDir, requests: list[signal.Signals]) -> int:
    """Starts the ranks, follows them to their end, and returns the exit code."""
    console = Console(cfg.train.steps, log_every=cfg.train.log_every)
    try:
        print(render(plan, cfg) if _trains(run) else plan.summary, end="\n\n")
        console.start(f"run {run.path}")
        failure = _follow(cfg, plan, run, console, requests)
    except BrokenPipeError:
        failure = Failure("Interrupted", "nobody reads the output any more", SIGNALLED + signal.SIGPIPE)
    except StackError as error:
        # A host whose answer was not waited for has no fault.
        failure = interrupted(requests[0]) if requests else Failure(type(error).__name__, str(error), error.exit_code)
    except Exception as error:
        _record(run, Failure(type(error).__name__, f"stack failed: {error}", StackError.exit_code))
        raise
    finally:
        with contextlib.suppress(OSError):
            console.close()
    return _close(cfg, run, console, failure)


def _follow(cfg: Config, plan: Plan, run: RunDir, console: Console, requests: list[signal.Signals]) -> Failure | None:
    """Starts the ranks, shows the run until it ends, and leaves no process behind."""
    place = meet(cfg, plan, run.path, requests)
    if requests:
        return interrupted(requests[0])
    console.note(f"starting {plan.world_size} ranks with {_STARTERS[cfg.launch.backend]} on {place.shown}")
    orders = [(host, _order(cfg, run, place, node)) for node, host in enumerate(place.hosts)]
    with agents(orders, run) as started:
        saves = cfg.checkpoint.every > 0 and _trains(run)
        return follow(started, run, console, requests, grace_s=cfg.launch.grace_s, saves=saves)


def _trains(run: RunDir) -> bool:
    return not run.evaluation.exists() and not run.check.exists()


def _order(cfg: Config, run: RunDir, place: Place, node: int) -> Order:
    """What host number `node` is to start."""
    host, first = place.hosts[node], sum(host.slots for host in place.hosts[:node])
    return Order(
        run=str(run.path),
        host=host.name,
        ranks=list(range(first, first + host.slots)),
        commands=backends.COMMANDS[cfg.launch.backend](place, run, node),
        environment=_environment(cfg, host, place.interfaces[node]),
        grace_s=cfg.launch.grace_s,
        # Of ssh the other end may not learn for a long time that it is cut off.
        silence_s=None if host.here else SILENCE_S,
    )


def _environment(cfg: Config, host: Host, interface: str | None) -> dict[str, str]:
    """Variables for a host beside its own: those of `launch.env`, and the network that leads to the others."""
    given = {} if host.here else forwarded(os.environ, cfg.launch.env)
    if interface is None:
        return given
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {**{name: interface for name in names if name not in os.environ}, **given}


def _close(cfg: Config, run: RunDir, console: Console, failure: Failure | None) -> int:
    """Writes FAILED.json or SAVED.json if need be, tells the user, and returns the exit code."""
    if failure is None or run.done.exists():
        console.close(_told(run))
        return 0
    _record(run, failure)
    culprit, where = "", ""
    if failure.exit_code == Requeue.exit_code:
        where = f"\ncurve: {run.curve}"
    elif failure.rank is not None:
        culprit, where = f"rank {failure.rank}: ", f"\nlog: {run.rank(failure.rank) / 'log.txt'}"
    elif failure.host is not None:
        where = f"\nlog: {run.launcher_log(failure.host)}"
    elif failure.type == "Interrupted" and _trains(run):
        kept = manifest.steps(manifest.root_of(cfg.checkpoint.path, run.path))
        where = f"\nto go on from step {kept[-1]}: stack resume {run.path}" if kept else ""
    first_line = failure.message.strip().splitlines()[0]
    # The reader of the output may have ended first, by the same Ctrl-C.
    with contextlib.suppress(OSError):
        kind = "" if failure.exit_code == Requeue.exit_code else f"{failure.type}: "
        console.close(f"{kind}{culprit}{first_line}{where}")
    return failure.exit_code


def _told(run: RunDir) -> str:
    """The last lines of a run that went well."""
    result = rundir.read_json(run.result)
    if result is None:
        return f"done: {run.path}\ncurve: {run.curve}"
    if run.check.exists():
        return result["told"]
    return (
        f"held-out loss {result['heldout_loss']:.6f} nats, perplexity {result['perplexity']:.4f}, over "
        f"{result['tokens']:,} tokens in {result['sequences']:,} of {result['of_sequences']:,} sequences\n"
        f"of: {result['weights']}"
    )


def _record(run: RunDir, failure: Failure) -> None:
    # On a full disk the exit code says it.
    with contextlib.suppress(OSError):
        rundir.write_json(run.ended_early(failure.exit_code), {**asdict(failure), "time": time.time()})
