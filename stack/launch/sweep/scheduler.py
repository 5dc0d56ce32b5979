"""Runs jobs, each in a process tree of its own. Starts as many at once as `max_parallel` and the free devices allow."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from stack.errors import RankFailure, Requeue, StackError
from stack.launch.signals import saves
from stack.launch.sweep.jobs import (
    DONE,
    FAILED,
    RUNNING,
    STACK,
    STOPPED,
    Job,
    command,
    is_elsewhere,
    look,
    losses,
)
from stack.launch.sweep.slots import Slots

#: Variable with the process id of the sweep. A job's `stack train` ends when that process is gone.
SWEEP_PID = "STACK_SWEEP_PID"
_POLL_S = 0.1
#: Seconds between the two SIGTERMs to a running job, when the sweep ends without a request to save.
_SAVE_S = 1.0
#: A job that is told to stop waits up to three times `launch.grace_s` for its ranks. Then it has this many seconds to
#: report how it ended.
_LAST_WORDS_S = 15.0


@dataclass
class _Started:
    job: Job
    process: subprocess.Popen
    devices: list[str]


class Scheduler:
    """Runs lists of jobs, one list after another.

    Args:
        requests: signals that asked the sweep to end, as they come in.
        report: called on each change of a job's state.
        note: called with a line for the user.
        stack: the `stack` command.
    """

    def __init__(
        self,
        slots: Slots,
        requests: list[signal.Signals],
        report: Callable[[Job], object],
        *,
        note: Callable[[str], object],
        max_parallel: int,
        fail_fast: bool,
        stack: Sequence[str] = STACK,
    ) -> None:
        self._slots, self._requests, self._report, self._stack = slots, requests, report, stack
        self._note = note
        self._max_parallel, self._fail_fast = max_parallel, fail_fast
        self._started: list[_Started] = []

    def run(self, jobs: Sequence[Job]) -> None:
        """Runs until each job is done or has failed. Skips jobs that are done already. At an early end the running jobs
        are stopped, and can be resumed."""
        waiting = list(jobs)
        try:
            while (waiting or self._started) and not self._is_over(jobs):
                while waiting and len(self._started) < self._max_parallel and self._start(waiting[0]):
                    waiting.pop(0)
                self._collect()
                time.sleep(_POLL_S if self._started else 0)
        finally:
            self._stop()

    def _is_over(self, jobs: Sequence[Job]) -> bool:
        return bool(self._requests) or (self._fail_fast and any(job.state == FAILED for job in jobs))

    def _start(self, job: Job) -> bool:
        """Starts a job. False if the job must wait for devices."""
        try:
            arguments = look(job)
            job.folder.mkdir(exist_ok=True)
            log = job.log.open("ab")
        except (StackError, OSError) as error:
            # The job's folder is damaged, or the disk is full. The other jobs are not affected.
            self._refuse(job, error)
            return True
        with log:
            return self._start_process(job, arguments, log)

    def _start_process(self, job: Job, arguments: list[str] | None, log: BinaryIO) -> bool:
        if arguments is None:
            job.how = "skipped"
            self._end(job, 0)
            return True
        devices = [] if is_elsewhere(job.cfg) else self._slots.take(job.devices)
        if devices is None:
            return False
        # A session of its own: Ctrl-C reaches the sweep only, which then stops its jobs in the right order.
        process = subprocess.Popen(
            command(job, arguments, self._stack),
            env=self._environment(job, devices),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._started.append(_Started(job, process, devices))
        job.how = "resumed" if arguments[0] == "resume" else "started"
        job.state, job.started = RUNNING, time.time()
        self._report(job)
        return True

    def _environment(self, job: Job, devices: list[str]) -> dict[str, str]:
        environment = {**os.environ, SWEEP_PID: str(os.getpid())}
        # This sweep may run under `wandb agent`, which sets the id of one W&B run. Each job is a run of its own.
        environment.pop("WANDB_RUN_ID", None)
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        elif self._max_parallel > 1 and not is_elsewhere(job.cfg):
            # Jobs that run at the same time share the cores.
            cores = len(os.sched_getaffinity(0)) // (self._max_parallel * job.ranks_per_node)
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
        return environment

    def _collect(self) -> None:
        for started in list(self._started):
            code = started.process.poll()
            if code is not None:
                self._leave(started)
                self._end(started.job, code)

    def _leave(self, started: _Started) -> None:
        self._started.remove(started)
        self._slots.give_back(started.devices)

    def _end(self, job: Job, code: int, *, stopped: bool = False) -> None:
        """Records how a job ended: by itself, or `stopped` by the sweep."""
        job.exit_code, job.ended = code if code >= 0 else 128 - code, None if job.how == "skipped" else time.time()
        job.state = DONE if code == 0 else STOPPED if stopped or code == Requeue.exit_code else FAILED
        try:
            job.objective, job.loss = losses(job) if code == 0 else (None, None)
        except (StackError, OSError) as error:
            self._refuse(job, error)
            return
        self._report(job)

    def _refuse(self, job: Job, error: Exception) -> None:
        """Marks a job as failed because of an error in this process."""
        job.state, job.exit_code = FAILED, error.exit_code if isinstance(error, StackError) else RankFailure.exit_code
        job.fault = f"{type(error).__name__}: {error}"
        self._report(job)

    def _stop(self) -> None:
        """Stops all running jobs at once. Each stops its own ranks; a job that does not end is killed. After the first
        Ctrl-C or SIGTERM the jobs have unlimited time to save, until the sweep gets another signal."""
        if saves(self._requests) and self._running():
            self._note("the running jobs save after this step, and end; a second Ctrl-C or signal ends them at once")
        self._terminate()
        began = time.monotonic()
        while self._running() and (saves(self._requests) or time.monotonic() - began < _SAVE_S):
            time.sleep(_POLL_S)
        self._terminate()
        for started in list(self._started):
            grace_s = started.job.cfg.launch.grace_s
            try:
                code = started.process.wait(3 * grace_s + _LAST_WORDS_S)
            except subprocess.TimeoutExpired:
                # The ranks of the job notice that their launcher is gone, and end too.
                os.killpg(started.process.pid, signal.SIGKILL)
                code = started.process.wait()
            self._leave(started)
            self._end(started.job, code, stopped=True)

    def _running(self) -> list[_Started]:
        return [started for started in self._started if started.process.poll() is None]

    def _terminate(self) -> None:
        """Sends SIGTERM to all running jobs. The first SIGTERM asks a job to save and end, the second ends the job."""
        for started in self._running():
            # The process group has the job's command, or an salloc that passes the signal on, but none of the ranks.
            os.killpg(started.process.pid, signal.SIGTERM)
