"""Runs whose ranks are forks of one process, the zygote, which has imported everything. A run takes about a second, and
a rank may be killed.

run = tiny_run(tmp_path, {"train.steps": 5})
assert zygote.run(["--config", str(run.config)], world_size=2) == [0, 0]
"""

import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import random
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

from stack.config.compose import compose, from_yaml
from stack.data import shards
from stack.health.orphan import AGENT_PID
from stack.plan.layout import make_plan
from stack.train import rundir
from stack.train.rundir import RunDir
from tests.helpers.pool import CASE_TIMEOUT_S, free_port

#: Two layers, 38 thousand parameters.
_SHAPE = "{hidden_size:32,intermediate_size:64,num_hidden_layers:2,num_attention_heads:2,num_key_value_heads:1}"
#: Modules that the ranks of a run import. A run imports the last three only late, which would take longer than the rest
#: of a tiny run.
_IMPORTS = (
    "torch",
    "deepspeed",
    "transformers",
    "stack.train.worker",
    "stack.parallel.engine",
    "stack.train.loop",
    "stack.train.recorder",
    "stack.train.restart",
    "deepspeed.runtime.zero.muon.original_muon",
    "transformers.models.llama.modeling_llama",
    "matplotlib.backends.backend_agg",
)
_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
_AFTER_FAILURE_S = 5
_START_S = 120
_POLL_S = 0.01


@dataclass(frozen=True)
class Killed:
    """Takes the place of the result of a rank that a signal ended."""

    signal: int


@dataclass(frozen=True)
class _Request:
    """A request to the zygote to fork ranks."""

    call: bytes
    """Pickle of (function, arguments), which each rank loads and calls after the fork."""
    world_size: int
    environment: Mapping[str, str | None]
    timeout_s: float
    output: str
    """File for the output of the ranks."""


@dataclass
class _Ranks:
    """The forked ranks of one request."""

    pids: list[int]
    codes: dict[int, int] = field(default_factory=dict)
    overdue: list[int] = field(default_factory=list)
    """Ranks that had to be killed because they did not end in time."""


class Zygote:
    """A process that has imported torch, DeepSpeed, transformers and the worker, and has a single thread."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there,), daemon=True)
        # Set before the imports of the process, because numpy would start threads.
        with patch.dict(os.environ, _ENVIRONMENT):
            self._process.start()
        # With this end open here too, the pipe would not end when the zygote ends.
        there.close()
        assert self._pipe.poll(_START_S), f"the zygote did not start within {_START_S} s"
        self.pid: int = self._pipe.recv()

    def run(
        self,
        argv: Sequence[str],
        world_size: int,
        env: Mapping[str, str | None] | None = None,
        timeout_s: float = 60.0,
    ) -> list[int]:
        """Runs `python -m stack.train ARGV` on `world_size` ranks, as the driver would, and waits until all have ended.

        Args:
            argv: arguments of the ranks.
            world_size: number of ranks.
            env: further environment variables; None removes a variable. STACK_AGENT_PID names the zygote, which takes
                the place of the driver; without the variable the ranks make their run directory themselves.
            timeout_s: seconds after which the remaining ranks are killed; they are also killed 5 s after the first rank
                has failed.

        Returns:
            The exit codes of the ranks; -9 for a rank that was killed.
        """
        environment = {AGENT_PID: str(self.pid), **(env or {})}
        with tempfile.NamedTemporaryFile("r") as output:
            ranks = self._fork(_run_worker, (list(argv),), world_size, environment, timeout_s, output.name)
            # pytest shows the output if the test fails.
            print(output.read(), end="")
        if ranks.overdue:
            print(f"killed, since they did not end: ranks {ranks.overdue}")
        return [ranks.codes[rank] for rank in range(world_size)]

    def run_function(
        self, function: Callable[..., Any], args: Sequence[Any], world_size: int, timeout_s: float = CASE_TIMEOUT_S
    ) -> list[Any]:
        """Calls `function(*args)` on new ranks of one process group. Returns the results of the ranks, with `Killed`
        for a rank that a signal ended.

        Raises:
            AssertionError: a rank raised (its traceback is the message), ended without a result, or took too long.
        """
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "output")
            ranks = self._fork(_run_function, (folder, function, *args), world_size, {}, timeout_s, str(output))
            answers = {rank: _answer(Path(folder), rank, code) for rank, code in ranks.codes.items()}
            print(output.read_text(), end="")
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in sorted(answers.items()) if not ok]
        if failed or ranks.overdue:
            raise AssertionError("\n".join([*failed, f"ranks that did not answer: {sorted(ranks.overdue)}"]))
        return [answers[rank][1] for rank in range(world_size)]

    def _fork(
        self,
        function: Callable[..., None],
        args: tuple[Any, ...],
        world_size: int,
        environment: Mapping[str, str | None],
        timeout_s: float,
        output: str,
    ) -> _Ranks:
        try:
            self._pipe.send(_Request(pickle.dumps((function, args)), world_size, environment, timeout_s, output))
            return self._pipe.recv()
        except BaseException:
            # The test was interrupted, and its answer would be taken for the answer to the next request.
            self.close()
            raise

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def close(self) -> None:
        """Ends the zygote and the ranks that it forked."""
        self._pipe.close()
        self._process.join(_AFTER_FAILURE_S)
        self._process.kill()
        self._process.join()


def _answer(folder: Path, rank: int, code: int) -> tuple[bool, Any]:
    """(True, the result of a rank) or (False, the reason of its failure)."""
    file = folder / f"{rank}.pickle"
    if file.exists():
        return pickle.loads(file.read_bytes())
    return (True, Killed(-code)) if code < 0 else (False, f"ended with {code} and without a result")


# Code of the zygote.


def _serve(pipe: Connection) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    for name in _IMPORTS:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a fork takes one thread along, and here are {len(threads)}"
    # Excludes the present objects from garbage collection: a collection in a forked rank would copy all their pages.
    gc.collect()
    gc.freeze()
    pipe.send(os.getpid())
    with contextlib.suppress(EOFError):
        while True:
            request = pipe.recv()
            port = free_port()
            ranks = _Ranks([_fork_rank(request, rank, port, pipe) for rank in range(request.world_size)])
            try:
                _wait(ranks, request.timeout_s, pipe)
            finally:
                _kill(ranks)
            pipe.send(ranks)


def _wait(ranks: _Ranks, timeout_s: float, pipe: Connection) -> None:
    """Waits until all ranks have ended, and kills them if they take too long.

    Raises:
        EOFError: the test that made the request has ended.
    """
    deadline = time.monotonic() + timeout_s
    while len(ranks.codes) < len(ranks.pids):
        for rank, pid in enumerate(ranks.pids):
            if rank not in ranks.codes and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                # Also kills processes that the rank started and left behind. This happens before `waitpid` frees the
                # rank's process id for another process.
                _kill_session(pid)
                ranks.codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if ranks.codes[rank]:
                    deadline = min(deadline, time.monotonic() + _AFTER_FAILURE_S)
        if time.monotonic() > deadline and not ranks.overdue:
            ranks.overdue += [rank for rank in range(len(ranks.pids)) if rank not in ranks.codes]
            _kill(ranks)
        if pipe.poll(_POLL_S):
            raise EOFError


def _kill(ranks: _Ranks) -> None:
    for rank, pid in enumerate(ranks.pids):
        if rank not in ranks.codes:
            _kill_session(pid)


def _kill_session(leader: int) -> None:
    # A rank that has just been forked is not the leader of a process group yet, hence `kill` too.
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            end(leader, signal.SIGKILL)


# Code of a forked rank.


def _fork_rank(request: _Request, rank: int, port: int, pipe: Connection) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        pipe.close()
        _own_streams(request.output)
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request.world_size, "MASTER_PORT": port}
        for name, value in {"MASTER_ADDR": "127.0.0.1", **own, **request.environment}.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = str(value)
        function, args = pickle.loads(request.call)
        function(*args)
        code = 0
    except BaseException:  # noqa: BLE001 - a rank must not return into the zygote's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _own_streams(output: str) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(nothing, 0)
    for stream in (1, 2):
        os.dup2(file, stream)
    for stream in (nothing, file):
        os.close(stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def _run_worker(argv: list[str]) -> None:
    """Runs `python -m stack.train`, which ends the process."""
    sys.argv = ["stack.train", *argv]
    runpy.run_module("stack.train", run_name="__main__")


def _run_function(folder: str, function: Callable[..., Any], *args: Any) -> None:
    from stack.parallel import zero

    try:
        zero.init_distributed(timeout=timedelta(seconds=CASE_TIMEOUT_S))
        answer = pickle.dumps((True, function(*args)))
    except BaseException:  # noqa: BLE001 - whatever a case raises is reported to the test
        answer = pickle.dumps((False, traceback.format_exc()))
    made = Path(folder, f".{os.environ['RANK']}")
    made.write_bytes(answer)
    made.rename(Path(folder, f"{os.environ['RANK']}.pickle"))


# Code of the test's process.


@functools.cache
def _session_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="stack-corpus-")


@functools.cache
def tiny_settings() -> dict[str, object]:
    """Overrides of a tiny run on two ranks in two pipeline stages. The first call writes the texts of its corpus, once
    for the session."""
    folder = Path(_session_folder().name)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(200)]
    (folder / "texts").mkdir()
    for number in range(12):
        lines = [" ".join(draw.choices(words, k=12)) for _ in range(100)]
        (folder / "texts" / f"{number:02}.txt").write_text("\n".join(lines))
    return {
        "data.source": "files",
        "data.paths": f"[{folder / 'texts'}]",
        "data.root": folder / "prepared",
        "data.vocab_size": 300,
        "data.seq_len": 32,
        "model.config": _SHAPE,
        "batch.global_size": 8,
        "batch.micro_size": 1,
        "schedule.warmup_steps": 0,
        "train.steps": 5,
        "train.eval_every": 0,
        "launch.ranks_per_node": 2,
        "log.wandb.mode": "disabled",
    }


def tiny_run(folder: Path, overrides: Mapping[str, object] | None = None) -> RunDir:
    """Makes a run directory below `folder` and prepares its corpus, as the driver does before it starts ranks.

    Args:
        folder: the run is below `folder`/runs.
        overrides: changes of `tiny_settings`, as {"key": value}.
    """
    settings = {**tiny_settings(), "run.root": folder / "runs", **(overrides or {})}
    cfg = compose([f"{key}={value}" for key, value in settings.items()])
    corpus = shards.prepare(cfg.data, seed=cfg.data.split_seed, progress=False)
    return rundir.create(cfg, make_plan(cfg), corpus=corpus)


def tiny_again(run: RunDir, overrides: Mapping[str, object] | None = None) -> RunDir:
    """Makes a run directory ready for another attempt, as `stack resume` does."""
    cfg = from_yaml(run.config, [f"{key}={value}" for key, value in (overrides or {}).items()])
    rundir.begin_again(run, cfg, make_plan(cfg), corpus=run.corpus)
    return run
