"""The main function of a rank: reads the config, joins the other ranks, trains, and reports how it ended."""

import contextlib
import faulthandler
import io
import math
import os
import resource
import signal
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from stack import disk
from stack.config.compose import compose, from_yaml
from stack.config.places import settled
from stack.config.schema import Config
from stack.errors import NumericsError, RankFailure, Requeue, UsageError
from stack.health.faults import FAULT
from stack.health.orphan import AGENT_PID, exit_with_parent
from stack.health.stopped import Stop
from stack.plan.layout import Plan, make_plan
from stack.train import bare, cores, ranks, rundir
from stack.train.ending import explained, failed
from stack.train.inputs import open_batches
from stack.train.output import own_output
from stack.train.progress import Phase, Progress
from stack.train.rundir import RunDir

if TYPE_CHECKING:
    from stack.parallel.mesh import Mesh

#: Set by the agent of a host to the CUDA_VISIBLE_DEVICES that the host had before the launcher changed it.
VISIBLE_DEVICES = "STACK_VISIBLE_DEVICES"


def main(argv: Sequence[str]) -> int:
    """Runs a rank and returns its exit code; the entry of `python -m stack.train`.

    The arguments are `--config RUN_DIR/config.yaml` from the driver, or Hydra overrides from a bare launcher.
    """
    # The lock is released on every return, also after a failure. A lock that stays would delay the next attempt on
    # another host.
    with contextlib.ExitStack() as held:
        return _main(argv, held)


def _main(argv: Sequence[str], held: contextlib.ExitStack) -> int:
    """
    Args:
        held: keeps the lock of the run directory. Code that ends the process without a return must close it.
    """
    launched = ranks.Launched(local_rank=ranks.local_rank())
    if VISIBLE_DEVICES in os.environ:
        # The launcher numbers devices from 0, even if the user had made only some of them visible.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[VISIBLE_DEVICES]
    _prepare_process()
    run: RunDir | None = None
    cfg: Config | None = None
    plan: Plan | None = None
    progress = Progress()

    def orphaned(error: RankFailure) -> None:
        failed(run, launched, error, error)
        held.close()

    try:
        launched = ranks.from_environment()
        rank = launched.rank
        exit_with_parent(orphaned)
        config_path, overrides = _parse(argv)
        named = RunDir(config_path.parent) if config_path else None
        if AGENT_PID in os.environ:
            # Without a driver this stays None until rank 0 holds the lock, so that an error before that writes nothing
            # into a run directory in which another process may be working.
            run = named
        cfg = from_yaml(config_path) if config_path else settled(compose(overrides))
        plan = make_plan(cfg, launched.world_size, launched.hosts)
        if cfg.launch.bind_cores:
            # Before the imports that start threads, since threads inherit the binding.
            cores.bind()
        if AGENT_PID not in os.environ:
            if named is not None:
                # A user's checkpoint.step is for one resume; a later restart goes on from the newest checkpoint.
                cfg = replace(cfg, checkpoint=replace(cfg.checkpoint, step="auto"))
            run = bare.agree_on_run(cfg, plan, rank, named, held)
        assert run is not None
        stop = _stop(run.rank(rank), held)
        _record_collectives(run.rank(rank))
        screen = _own_output(run, rank, progress, shown=config_path is None and rank == 0)
        if run.evaluation.exists():
            _evaluate(cfg, plan, run, progress, rank=rank)
        elif run.check.exists():
            _check(cfg, plan, run, rank=rank)
        else:
            _train(cfg, plan, run, stop, progress, launched=launched, screen=screen)
        # A rank that has ended without done.json, error.json or stopped.json was killed.
        rundir.write_last(run.rank(rank) / "done.json", {"time": time.time()})
    except Exception as error:  # noqa: BLE001 - the driver must know for every kind of error which rank failed first
        return failed(run, launched, error, explained(error, cfg, plan))
    return 0


def _prepare_process() -> None:
    """Escapes characters that the output's encoding lacks, so that printing them does not end the rank. Raises the
    limit of open files, which is often 1,024, because each connection to another rank needs one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with contextlib.suppress(OSError, ValueError):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _record_collectives(folder: Path) -> None:
    """Has torch write this rank's last collectives into `folder` when NCCL's watchdog gives up on one of them. torch
    reads these variables when it makes the first group."""
    defaults = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(folder / "collectives_rank_"),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _train(
    cfg: Config,
    plan: Plan,
    run: RunDir,
    stop: Stop,
    progress: Progress,
    *,
    launched: ranks.Launched,
    screen: TextIO | None,
) -> None:
    """
    Raises:
        Requeue: the run was asked to end, and its state is saved.
    """
    # Heavy imports come after all checks that do not need them.
    from stack.parallel import zero
    from stack.train.loop import train
    from stack.train.recorder import Recorder
    from stack.train.restart import Restart

    mesh = _join(cfg, plan)
    progress.at(Phase.READING, 0)
    restart = Restart(cfg, plan, run, mesh)
    engine = restart.engine()
    try:
        with Recorder(cfg, plan, run, engine, launched=launched, screen=screen) as recorder:
            if FAULT in os.environ:
                recorder.note(f"{FAULT}={os.environ[FAULT]}: faults of tests will happen in this run")
            state = restart.state(engine, tell=recorder.note)
            training, heldout = open_batches(cfg, plan, run.corpus, before=restart.before(state))
            with restart.saver(engine, tell=recorder.note) as saver:
                asked = stop.asked
                if launched.rank == 0 and AGENT_PID not in os.environ:
                    asked = bare.hears_stop(run, asked, saves=cfg.checkpoint.every > 0)
                if cfg.checkpoint.every:
                    stop.wait_for_step()
                progress.at(Phase.TRAINING, state.step)
                state = train(
                    cfg,
                    state,
                    engine=engine,
                    training=training,
                    heldout=heldout,
                    saver=saver,
                    asked=asked,
                    replica=mesh.replica,
                    mfu=recorder.mfu,
                    record=progress.counted(recorder.record),
                )
            progress.at(Phase.ENDING, state.step)
            if state.step < cfg.train.steps:
                saved = f"saved on request after step {state.step} of {cfg.train.steps}"
                raise Requeue(f"{saved}; to go on: {run.resume_command}")
            # Barrier before done.json, so that one rank's exit cannot look like a failure to the others. It also comes
            # before rank 0 finishes its upload to W&B, so that no rank waits in a collective for that.
            zero.close()
    except (NumericsError, Requeue):
        # Every rank raises these errors. The barrier keeps all ranks alive until rank 0 has finished the curve and W&B,
        # because the launcher ends all ranks when one ends.
        zero.close()
        raise
    if launched.rank == 0:
        rundir.write_last(run.done, {"step": state.step, "tokens": state.tokens, "time": time.time()})


def _evaluate(cfg: Config, plan: Plan, run: RunDir, progress: Progress, *, rank: int) -> None:
    from stack.parallel import zero
    from stack.train.loop import evaluate
    from stack.train.restart import weights

    mesh = _join(cfg, plan)
    progress.at(Phase.READING, 0)
    engine, source = weights(cfg, plan, run, mesh)
    progress.at(Phase.TRAINING, 0)
    _, heldout = open_batches(cfg, plan, run.corpus)
    loss, tokens = evaluate(cfg, engine, heldout, mesh.replica)
    zero.close()
    if rank == 0:
        result = {
            "heldout_loss": loss,
            "perplexity": math.exp(loss),
            "tokens": tokens,
            "sequences": min(cfg.train.eval_sequences, heldout.num_sequences),
            "of_sequences": heldout.num_sequences,
            "weights": source,
        }
        rundir.write_json(run.result, result)
        rundir.write_json(run.done, {"time": time.time()})


def _check(cfg: Config, plan: Plan, run: RunDir, *, rank: int) -> None:
    from stack.train.check import check

    _quiet()
    check(cfg, plan, run, rank)


def _join(cfg: Config, plan: Plan) -> "Mesh":
    """Joins the other ranks and makes the process groups. Collective.

    Raises:
        HangError, HostError: a host differs from the others, or a link between them does not work.
    """
    from stack.health.ranks import check_ranks
    from stack.parallel import zero
    from stack.parallel.mesh import make_mesh

    _quiet()
    timeout = timedelta(seconds=cfg.health.hang_timeout_s)
    zero.init_distributed(timeout=timeout)
    mesh = make_mesh(plan, timeout=timeout, disk_timeout=timedelta(seconds=cfg.checkpoint.timeout_s))
    print(mesh, flush=True)
    if plan.nodes > 1:
        # Before the model is built, which may take minutes.
        print(check_ranks(mesh.device), flush=True)
    return mesh


def _quiet() -> None:
    # DeepSpeed uses deprecated names of torch's collectives, which give a warning for each call site and rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _parse(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    # Some launchers add `--local_rank=N`. It is ignored; the rank comes from the environment.
    arguments = [a for a in argv if not a.startswith(("--local_rank", "--local-rank"))]
    if arguments[:1] == ["--config"]:
        if len(arguments) != 2:
            raise UsageError("--config takes the path of a run's config.yaml and nothing after it")
        return Path(arguments[1]).absolute(), []
    return None, arguments


def _own_output(run: RunDir, rank: int, progress: Progress, *, shown: bool) -> TextIO | None:
    """Writes rank.json, and sends all output of this process to the rank's log.txt. SIGUSR2 then writes the Python
    stacks of all threads there.

    Returns:
        The previous standard output if `shown`, else None.
    """
    folder = run.rank(rank)
    folder.mkdir(parents=True, exist_ok=True)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    about = {"pid": os.getpid(), "host": socket.gethostname(), "progress": progress.file}
    rundir.write_json(folder / "rank.json", about)
    disk.reserve(folder)
    screen = own_output(folder / "log.txt", shown=shown)
    faulthandler.enable()
    return screen


def _stop(folder: Path, held: contextlib.ExitStack) -> Stop:
    return Stop(lambda: rundir.write_json(folder / "stopped.json", {"time": time.time()}), leave=held.close)
