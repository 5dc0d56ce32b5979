"""What one rank runs: its config, its place, its data, its stage, the loop, the outcome."""

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

from stack.config.compose import compose, from_yaml
from stack.config.places import settled
from stack.config.schema import Config
from stack.data.manifest import locate
from stack.errors import HangError, NumericsError, RankFailure, Requeue, StackError, UsageError
from stack.health.lost_peer import is_lost_peer
from stack.health.orphan import AGENT_PID, exit_with_parent
from stack.health.stopped import Stop
from stack.plan.layout import Plan, make_plan
from stack.train import cores, ranks, rundir
from stack.train.inputs import open_batches
from stack.train.lock import RunLock
from stack.train.rundir import RunDir

if TYPE_CHECKING:
    from stack.parallel.mesh import Mesh

#: Set by the agent of a host: the CUDA_VISIBLE_DEVICES that it found there.
VISIBLE_DEVICES = "STACK_VISIBLE_DEVICES"


def main(argv: Sequence[str]) -> int:
    """Entry of `python -m stack.train`, and the exit code of the rank.

    The arguments are `--config RUN_DIR/config.yaml` from the driver, or Hydra overrides from a bare launcher.
    """
    launched = ranks.Launched(local_rank=ranks.local_rank())
    if VISIBLE_DEVICES in os.environ:
        # The launcher numbers the devices from 0 whatever the user had made visible.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[VISIBLE_DEVICES]
    run: RunDir | None = None
    try:
        launched = ranks.from_environment()
        rank = launched.rank
        exit_with_parent(lambda error: _failed(run, launched, error, error.exit_code))
        config_path, overrides = _parse(argv)
        run = RunDir(config_path.parent) if config_path else None
        cfg = from_yaml(config_path) if config_path else settled(compose(overrides))
        plan = make_plan(cfg, launched.world_size, launched.hosts)
        if cfg.launch.bind_cores:
            # Ahead of the imports that start threads.
            cores.bind()
        if AGENT_PID not in os.environ:
            if run is not None:
                # What a user resumed from once is not what the run goes on from after that.
                cfg = replace(cfg, checkpoint=replace(cfg.checkpoint, step="auto"))
            run = _agree_on_run(cfg, plan, rank, run)
        assert run is not None
        stop = _stop(run.rank(rank))
        screen = _own_output(run, rank, shown=config_path is None and rank == 0)
        if run.evaluation.exists():
            _evaluate(cfg, plan, run, rank=rank)
        elif run.check.exists():
            _check(cfg, plan, run, rank=rank)
        else:
            _train(cfg, plan, run, stop, launched=launched, screen=screen)
        # A rank that is gone without this, an error.json or a stopped.json was killed.
        rundir.write_json(run.rank(rank) / "done.json", {"time": time.time()})
    except StackError as error:
        return _failed(run, launched, error, error.exit_code)
    except Exception as error:  # noqa: BLE001 - whatever it was, the driver must learn which rank failed first
        hang = _as_hang(error)
        return _failed(run, launched, hang or error, hang.exit_code if hang else RankFailure.exit_code)
    return 0


def _train(
    cfg: Config, plan: Plan, run: RunDir, stop: Stop, *, launched: ranks.Launched, screen: TextIO | None
) -> None:
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
        with Recorder(cfg, plan, run, engine, launched=launched, screen=screen) as recorder:
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
                raise Requeue(f"{saved}; to go on: stack resume {run.path}")
            # Nobody is done before everybody is; and no rank waits in a group for rank 0's W&B.
            zero.close()
    except (NumericsError, Requeue):
        # Every rank is here. The launcher ends all when one ends, and rank 0 has the curve and W&B to finish before.
        zero.close()
        raise
    if launched.rank == 0:
        rundir.write_json(run.done, {"step": state.step, "tokens": state.tokens, "time": time.time()})


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


def _agree_on_run(cfg: Config, plan: Plan, rank: int, run: RunDir | None) -> RunDir:
    """Without a driver rank 0 makes the run directory, or begins another attempt in the one that was named, and tells
    the others. Collective.

    Raises:
        DataError: on every rank, where the corpus is not prepared.
        UsageError: on rank 0, where another process is at work in the run directory.
    """
    corpus = locate(cfg.data, seed=cfg.data.split_seed)
    import torch.distributed as dist

    from stack.parallel import zero

    zero.init_distributed(timeout=timedelta(seconds=cfg.health.hang_timeout_s))
    if rank == 0:
        if run is None:
            run = rundir.create(cfg, plan, corpus=corpus)
            RunLock(run.path).acquire()
        else:
            RunLock(run.path).acquire()
            rundir.begin_again(run, cfg, plan, corpus=corpus)
    told: list[str | None] = [str(run.path) if run is not None else None]
    dist.broadcast_object_list(told, src=0)
    return RunDir(Path(str(told[0])))


def _own_output(run: RunDir, rank: int, *, shown: bool) -> TextIO | None:
    """Says who this rank is and sends all its output to its log.txt.

    Returns:
        The output it had before, if `shown`.
    """
    folder = run.rank(rank)
    folder.mkdir(parents=True, exist_ok=True)
    rundir.write_json(folder / "rank.json", {"pid": os.getpid(), "host": socket.gethostname()})
    screen = os.fdopen(os.dup(sys.stdout.fileno()), "w") if shown else None
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    os.close(log)
    faulthandler.enable()
    return screen


def _stop(folder: Path) -> Stop:
    return Stop(lambda: rundir.write_json(folder / "stopped.json", {"time": time.time()}))


def _as_hang(error: Exception) -> HangError | None:
    """The error of a collective that waited for `health.hang_timeout_s`; torch and gloo know it by its words alone."""
    words = str(error).lower()
    if not isinstance(error, RuntimeError) or not ("timed out" in words or "timeout" in words):
        return None
    hang = HangError(f"another rank did not answer within health.hang_timeout_s: {error}")
    hang.__cause__ = error
    return hang


def _failed(run: RunDir | None, launched: ranks.Launched, error: Exception, exit_code: int) -> int:
    """Leaves the error where the driver finds it and its traceback in the log."""
    if run is None:
        # Nobody has a folder yet. One line a host: a config is wrong on all of them, a corpus may be missing on one.
        if not isinstance(error, StackError):
            traceback.print_exception(error)
        elif launched.local_rank == 0:
            print(f"{type(error).__name__}: {error} (on {socket.gethostname()})", file=sys.stderr)
        return exit_code
    traceback.print_exception(error)
    told: dict[str, Any] = {
        "rank": launched.rank,
        "type": type(error).__name__,
        "message": str(error) or type(error).__name__,
        "exit_code": exit_code,
        "time": time.time(),
    }
    rundir.write_json(run.rank(launched.rank) / "error.json", told)
    if AGENT_PID not in os.environ:
        # Nobody else is there to say how the run ended. What says most is kept.
        file = run.ended_early(exit_code)
        known = rundir.read_json(file)
        if known is None or (is_lost_peer(known["message"]) and not is_lost_peer(told["message"])):
            rundir.write_json(file, told)
    return exit_code
