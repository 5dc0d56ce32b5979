"""What one rank runs: its config, its place, its data, its stage, the loop, the outcome."""

import contextlib
import faulthandler
import math
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from stack import disk
from stack.checkpoint import room
from stack.config.compose import compose, from_yaml
from stack.config.places import settled
from stack.config.schema import Config
from stack.data.manifest import locate
from stack.errors import HangError, NumericsError, RankFailure, Requeue, StackError, UsageError
from stack.health.orphan import AGENT_PID, exit_with_parent
from stack.health.stopped import Stop
from stack.plan.layout import Plan, make_plan
from stack.train import cores, ranks, rundir
from stack.train.inputs import open_batches
from stack.train.lock import RunLock
from stack.train.output import own_output
from stack.train.rundir import RunDir

if TYPE_CHECKING:
    from stack.parallel.mesh import Mesh

#: Set by the agent of a host: the CUDA_VISIBLE_DEVICES that it found there.
VISIBLE_DEVICES = "STACK_VISIBLE_DEVICES"


def main(argv: Sequence[str]) -> int:
    """Entry of `python -m stack.train`, and the exit code of the rank.

    The arguments are `--config RUN_DIR/config.yaml` from the driver, or Hydra overrides from a bare launcher.
    """
    # Closed on every return, also after a failure: a lock that is left behind holds up the next attempt elsewhere.
    with contextlib.ExitStack() as held:
        return _main(argv, held)


def _main(argv: Sequence[str], held: contextlib.ExitStack) -> int:
    """
    Args:
        held: takes the lock of the run directory; closed by whatever ends the process other than by a return.
    """
    rank = 0
    if VISIBLE_DEVICES in os.environ:
        # The launcher numbers the devices from 0 whatever the user had made visible.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[VISIBLE_DEVICES]
    run: RunDir | None = None

    def orphaned(error: RankFailure) -> None:
        _failed(run, rank, error, error.exit_code)
        held.close()

    try:
        rank, world_size, hosts = ranks.from_environment()
        exit_with_parent(orphaned)
        config_path, overrides = _parse(argv)
        named = RunDir(config_path.parent) if config_path else None
        if AGENT_PID in os.environ:
            # Without a driver the run is not this process's until it holds the lock: it leaves nothing there before.
            run = named
        cfg = from_yaml(config_path) if config_path else settled(compose(overrides))
        plan = make_plan(cfg, world_size, hosts)
        if cfg.launch.bind_cores:
            # Ahead of the imports that start threads.
            cores.bind()
        if AGENT_PID not in os.environ:
            if named is not None:
                # What a user resumed from once is not what the run goes on from after that.
                cfg = replace(cfg, checkpoint=replace(cfg.checkpoint, step="auto"))
            run = _agree_on_run(cfg, plan, rank, named, held)
        assert run is not None
        stop = _stop(run.rank(rank), held)
        screen = _own_output(run, rank, shown=config_path is None and rank == 0)
        if run.evaluation.exists():
            _evaluate(cfg, plan, run, rank=rank)
        elif run.check.exists():
            _check(cfg, plan, run, rank=rank)
        else:
            _train(cfg, plan, run, stop, rank=rank, screen=screen)
        # A rank that is gone without this, an error.json or a stopped.json was killed.
        rundir.write_last(run.rank(rank) / "done.json", {"time": time.time()})
    except StackError as error:
        return _failed(run, rank, error, error.exit_code)
    except Exception as error:  # noqa: BLE001 - whatever it was, the driver must learn which rank failed first
        hang = _as_hang(error)
        return _failed(run, rank, hang or error, hang.exit_code if hang else RankFailure.exit_code)
    return 0


def _train(cfg: Config, plan: Plan, run: RunDir, stop: Stop, *, rank: int, screen: TextIO | None) -> None:
    """
    Raises:
        Requeue: somebody asked for the end of the run, and it is saved.
    """
    # Heavy imports come after everything that can be refused without them.
    from stack.parallel import zero
    from stack.train.loop import train
    from stack.train.recorder import Recorder
    from stack.train.restart import Restart

    mesh = _join(cfg, plan)

    restart = Restart(cfg, plan, run, mesh)
    engine = restart.engine()
    try:
        with Recorder(cfg, plan, run, engine, rank=rank, screen=screen) as recorder:
            state = restart.state(engine, tell=recorder.note)
            training, heldout = open_batches(cfg, plan, run.corpus, before=restart.before(state))
            with restart.saver(engine, tell=recorder.note) as saver:
                if cfg.checkpoint.every:
                    stop.wait_for_step()
                state = train(
                    cfg,
                    state,
                    engine=engine,
                    training=training,
                    heldout=heldout,
                    saver=saver,
                    asked=stop.asked,
                    replica=mesh.replica,
                    mfu=recorder.mfu,
                    record=recorder.record,
                )
            if state.step < cfg.train.steps:
                saved = f"saved on request after step {state.step} of {cfg.train.steps}"
                raise Requeue(f"{saved}; to go on: {run.resume_command}")
            # Nobody is done before everybody is; and no rank waits in a group for rank 0's W&B.
            zero.close()
    except (NumericsError, Requeue):
        # Every rank is here. The launcher ends all when one ends, and rank 0 has the curve and W&B to finish before.
        zero.close()
        raise
    if rank == 0:
        rundir.write_last(run.done, {"step": state.step, "tokens": state.tokens, "time": time.time()})


def _evaluate(cfg: Config, plan: Plan, run: RunDir, *, rank: int) -> None:
    from stack.parallel import zero
    from stack.train.loop import evaluate
    from stack.train.restart import weights

    mesh = _join(cfg, plan)
    engine, source = weights(cfg, plan, run, mesh)
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
    """Meets the other ranks. Collective.

    Raises:
        HangError, HostError: a host differs from the others, or a link between them does not work.
    """
    from stack.health.ranks import check_ranks
    from stack.parallel import zero
    from stack.parallel.mesh import make_mesh

    _quiet()
    timeout = timedelta(seconds=cfg.health.hang_timeout_s)
    zero.init_distributed(timeout=timeout)
    mesh = make_mesh(plan, timeout=timeout)
    print(mesh, flush=True)
    if plan.nodes > 1:
        # Ahead of the model, which takes its time.
        print(check_ranks(mesh.device), flush=True)
    return mesh


def _quiet() -> None:
    # DeepSpeed calls collectives by names that torch has since renamed; one warning a call site and rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _parse(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    # Launchers add `--local_rank=N` unless told not to; the rank comes from the environment.
    arguments = [a for a in argv if not a.startswith(("--local_rank", "--local-rank"))]
    if arguments[:1] == ["--config"]:
        if len(arguments) != 2:
            raise UsageError("--config takes the path of a run's config.yaml and nothing after it")
        return Path(arguments[1]).absolute(), []
    return None, arguments


def _agree_on_run(cfg: Config, plan: Plan, rank: int, run: RunDir | None, held: contextlib.ExitStack) -> RunDir:
    """Without a driver rank 0 makes the run directory, or begins another attempt in the one that was named, and tells
    the others. Collective.

    Raises:
        DataError: on every rank, where the corpus is not prepared.
        UsageError: on rank 0, where another process is at work in the run directory.
        ConfigError: on rank 0, where no checkpoint can be written.
    """
    corpus = locate(cfg.data, seed=cfg.data.split_seed)
    from stack.parallel import messages, zero

    zero.init_distributed(timeout=timedelta(seconds=cfg.health.hang_timeout_s))
    if rank == 0:
        if run is None:
            room.check(cfg, plan)
            run = rundir.create(cfg, plan, corpus=corpus)
            held.enter_context(RunLock(run.path))
        else:
            held.enter_context(RunLock(run.path))
            room.check(cfg, plan, run.path)
            rundir.begin_again(run, cfg, plan, corpus=corpus)
    return RunDir(Path(messages.broadcast(str(run.path) if run else None)))


def _own_output(run: RunDir, rank: int, *, shown: bool) -> TextIO | None:
    """Says who this rank is and sends all its output to its log.txt.

    Returns:
        The output it had before, if `shown`.
    """
    folder = run.rank(rank)
    folder.mkdir(parents=True, exist_ok=True)
    rundir.write_json(folder / "rank.json", {"pid": os.getpid(), "host": socket.gethostname()})
    disk.reserve(folder)
    screen = own_output(folder / "log.txt", shown=shown)
    faulthandler.enable()
    return screen


def _stop(folder: Path, held: contextlib.ExitStack) -> Stop:
    return Stop(lambda: rundir.write_json(folder / "stopped.json", {"time": time.time()}), leave=held.close)


def _as_hang(error: Exception) -> HangError | None:
    """The error of a collective that waited for `health.hang_timeout_s`; torch and gloo know it by its words alone."""
    words = str(error).lower()
    if not isinstance(error, RuntimeError) or not ("timed out" in words or "timeout" in words):
        return None
    hang = HangError(f"another rank did not answer within health.hang_timeout_s: {error}")
    hang.__cause__ = error
    return hang


def _failed(run: RunDir | None, rank: int, error: Exception, exit_code: int) -> int:
    """Leaves the error where the driver finds it and its traceback in the log."""
    # The launcher's output may go to a full disk, or to nobody.
    with contextlib.suppress(OSError):
        if run is not None or not isinstance(error, StackError):
            traceback.print_exception(error)
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            # One line a host: a config is wrong on all of them, a corpus may be missing on one.
            print(f"{type(error).__name__}: {error} (on {socket.gethostname()})", file=sys.stderr)
    if run is None:
        return exit_code
    told: dict[str, Any] = {
        "rank": rank,
        "type": type(error).__name__,
        "message": str(error) or type(error).__name__,
        "exit_code": exit_code,
        "time": time.time(),
    }
    rundir.write_last(run.rank(rank) / "error.json", told)
    if AGENT_PID not in os.environ:
        # Without a driver the ranks themselves say how the run ended.
        rundir.record_end(run, told)
    return exit_code
