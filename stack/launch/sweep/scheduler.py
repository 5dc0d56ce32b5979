"""Running jobs, each in a process tree of its own, so many at once as are wanted and have devices."""

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

#: Tells a job's `stack train` which process it must not outlive.
SWEEP_PID = "STACK_SWEEP_PID"
_POLL_S = 0.1
#: What a job that is not to go on has for saving, before it is told to stop.
_SAVE_S = 1.0
#: A job that is told to stop gives its ranks `launch.grace_s`, up to three times, and then tells how it ended.
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
        report: is told of each change of a job's state.
        note: takes a line for the user.
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
        """Until each job is done or has failed. What is done already is not started; whatever ends this early stops the
        jobs at work, which can then be resumed."""
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
        """False where it must wait for devices."""
        try:
            arguments = look(job)
            job.folder.mkdir(exist_ok=True)
            log = job.log.open("ab")
        except (StackError, OSError) as error:
            # What an earlier command left is damaged, or the disk is full: this job's alone.
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
        # A session of its own: Ctrl-C reaches the sweep alone, which then stops its jobs in good order.
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
        # One run of `wandb agent` may be a sweep of ours; its jobs are not one run.
        environment.pop("WANDB_RUN_ID", None)
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        elif self._max_parallel > 1 and not is_elsewhere(job.cfg):
            # Jobs beside each other share the cores too.
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
        """Takes in how a job ended, by itself or `stopped`."""
        job.exit_code, job.ended = code if code >= 0 else 128 - code, None if job.how == "skipped" else time.time()
        job.state = DONE if code == 0 else STOPPED if stopped or code == Requeue.exit_code else FAILED
        try:
            job.objective, job.loss = losses(job) if code == 0 else (None, None)
        except (StackError, OSError) as error:
            self._refuse(job, error)
            return
        self._report(job)

    def _refuse(self, job: Job, error: Exception) -> None:
        """A job that failed here, before its own command could say why."""
        job.state, job.exit_code = FAILED, error.exit_code if isinstance(error, StackError) else RankFailure.exit_code
        job.fault = f"{type(error).__name__}: {error}"
        self._report(job)

    def _stop(self) -> None:
        """All jobs at once: each stops its own ranks, and what does not end is killed. Where the sweep got Ctrl-C or
        SIGTERM they have all the time that they need to save, until it gets another signal."""
        if saves(self._requests) and self._running():
            self._note("the jobs at work save after this step, and end; a second Ctrl-C or signal ends them at once")
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
                # Its ranks see that whoever started them is gone, and end too.
                os.killpg(started.process.pid, signal.SIGKILL)
                code = started.process.wait()
            self._leave(started)
            self._end(started.job, code, stopped=True)

    def _running(self) -> list[_Started]:
        return [started for started in self._started if started.process.poll() is None]

    def _terminate(self) -> None:
        """The first SIGTERM asks a job to save and end, the second one ends it."""
        for started in self._running():
            # The group holds an salloc as well, which passes it on, and none of the ranks.
            os.killpg(started.process.pid, signal.SIGTERM)
