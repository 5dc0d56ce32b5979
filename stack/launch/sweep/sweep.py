"""`stack train -m`: Hydra's sweeper makes jobs, and each is an ordinary `stack train` in a process tree of its own.

Hydra's sweeper runs only in this process, not in jobs or ranks.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from stack.config import multirun
from stack.config.multirun import Request
from stack.config.places import absolute, settled
from stack.errors import ConfigError, RankFailure, Requeue, StackError, UsageError
from stack.health.orphan import is_alive
from stack.health.stopped import SIGNALLED
from stack.launch.signals import saves, stop_requests
from stack.launch.sweep.board import Board
from stack.launch.sweep.jobs import FAILED, STACK, Job, best_of, make_job
from stack.launch.sweep.scheduler import SWEEP_PID, Scheduler
from stack.launch.sweep.slots import Slots, check_room, devices_of_a_job
from stack.train.lock import RunLock
from stack.train.rundir import write_json

_WATCH_S = 1.0


class _EndedEarlyError(StackError):
    """Ends the sweeper's loop when no more jobs must be run. The board has already shown why."""


def sweep(lines: Sequence[str], *, stack: Sequence[str] = STACK) -> int:
    """Runs all jobs of a sweep that are not done.

    Returns 0; 9 if a job failed; 75 if jobs were asked to end and have saved; or 128 + the number of the signal that
    stopped the sweep.

    Args:
        lines: overrides, some with several values, and Hydra's own overrides for its launcher and sweeper.
        stack: the `stack` command that runs a job.

    Raises:
        StackError: some job's config or layout is wrong; nothing was started.
    """
    request = multirun.read(lines)
    folder = _folder(request)
    with _removed_if_unused(folder), RunLock(folder), stop_requests() as requests:
        work = _Work(request, folder, requests, stack)
        try:
            multirun.multirun(request, folder, work.run_jobs)
        except _EndedEarlyError:
            pass
        except ConfigError:
            # Optuna raises an error if all trials have failed. The board has shown the failures already.
            if not any(job.state == FAILED for job in work.board.jobs):
                raise
        finally:
            work.close()
    saved = any(job.exit_code == Requeue.exit_code for job in work.board.jobs)
    if requests and not (saved and saves(requests)):
        return SIGNALLED + requests[0]
    if any(job.state == FAILED for job in work.board.jobs):
        return RankFailure.exit_code
    return Requeue.exit_code if saved else 0


class _Work:
    """State that the jobs of one sweep share."""

    def __init__(self, request: Request, folder: Path, requests: list[signal.Signals], stack: Sequence[str]) -> None:
        self._request, self._folder, self._requests, self._stack = request, folder, requests, stack
        self._known: dict[str, Job] = {}
        self.board = Board()

    def run_jobs(
        self, jobs: list[list[str]], *, max_parallel: int, devices: Any, fail_fast: bool
    ) -> list[float | None]:
        """Runs one list of a sweeper's jobs, each once, and returns their objectives.

        Raises:
            StackError: a job's settings are wrong, and none was started; or the sweep ends early.
        """
        if max_parallel < 1:
            raise ConfigError(f"hydra.launcher.max_parallel={max_parallel}: at least one job must run at a time; use 1")
        slots = Slots()
        each = devices_of_a_job(devices, slots)
        asked = [make_job(self._request, swept, self._folder, each) for swept in jobs]
        new = {job.id: job for job in asked if job.id not in self._known}
        check_room(slots, list(new.values()), max_parallel)
        if not self._known:
            self.board.start(f"sweep {self._folder}")
        self._known |= new
        self.board.jobs += new.values()
        scheduler = Scheduler(
            slots,
            self._requests,
            self._tell,
            note=self._note,
            max_parallel=max_parallel,
            fail_fast=fail_fast,
            stack=self._stack,
        )
        scheduler.run(list(new.values()))
        if self._requests or (fail_fast and any(job.state == FAILED for job in new.values())):
            raise _EndedEarlyError
        return [self._known[job.id].objective for job in asked]

    def close(self) -> None:
        """Reports how the sweep ended, on the screen and in sweep.json."""
        # Handled separately: the output may be closed, or the disk may be full.
        with contextlib.suppress(OSError):
            self.board.close(self._folder)
        if self.board.jobs:
            best = best_of(self.board.jobs)
            told = (
                {**best.job.row(), "measure": best.measure, "value": best.value, "go_on": best.command}
                if best
                else None
            )
            counts = Counter(job.state for job in self.board.jobs)
            with contextlib.suppress(OSError):
                write_json(self._folder / "sweep.json", {"time": time.time(), "jobs": dict(counts), "best": told})

    def _note(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.board.note(text)

    def _tell(self, job: Job) -> None:
        # A closed output or a full disk must not end the jobs.
        with contextlib.suppress(OSError), (self._folder / "sweep.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), **job.row()}) + "\n")
        with contextlib.suppress(OSError):
            self.board.changed(job)


def end_with_sweep() -> None:
    """If this command is a job of a sweep, starts a thread that stops the command once the process of the sweep is
    gone. A sweep that was killed by SIGKILL cannot stop its jobs, and their ranks would use devices that a repeated
    sweep gives to other jobs."""
    pid = os.environ.get(SWEEP_PID)
    if pid is None:
        return

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            above = psutil.Process(int(pid))
            while is_alive(above):
                time.sleep(_WATCH_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="sweep-watch").start()


def _folder(request: Request) -> Path:
    """The folder of the sweep. Its name depends on the overrides, so that the same sweep is found again.

    Raises:
        ConfigError: the first job's config is wrong, or gives no objective to a sweeper that needs one.
    """
    cfg = settled(request.example())
    if request.is_optuna and cfg.train.eval_every == 0:
        raise ConfigError("train.eval_every=0: Optuna needs each job's held-out loss; use train.eval_every=20")
    if request.folder is not None:
        return Path(absolute("hydra.sweep.dir", request.folder))
    return Path(cfg.run.root) / cfg.run.name / "sweeps" / request.id


@contextlib.contextmanager
def _removed_if_unused(folder: Path) -> Iterator[None]:
    """Makes a folder, and removes it at the end if no job was made."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder} cannot be created ({error.strerror}); use a writable folder"
        ) from error
    try:
        yield
    finally:
        if made and not (folder / "sweep.jsonl").exists():
            for name in ("multirun.yaml", ".lock"):
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for path in made:
                    path.rmdir()
