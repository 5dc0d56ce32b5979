"""Shows the jobs of a sweep: a live table on a terminal, otherwise a line for each change. At the end prints a table
sorted by the objective."""

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from stack.launch.sweep.jobs import DONE, FAILED, RUNNING, STOPPED, WAITING, Job, best_of, why_failed
from stack.observe.jsonl import Follower
from stack.observe.metrics import StepRecord
from stack.observe.table import aligned

_REFRESH_HZ = 2
_TITLES = ("job", "state", "step", "loss", "held-out", "time", "overrides")
#: Order of the live table: running jobs come first, in case the screen is too small for all jobs.
_ORDER = (RUNNING, FAILED, STOPPED, WAITING, DONE)


class Board:
    """Shows jobs on `out` (standard output if None). It hides a terminal's cursor, so `close` must be called."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.jobs: list[Job] = []
        self._out = sys.stdout if out is None else out
        self._rows: dict[Path, tuple[Follower, list[StepRecord]]] = {}
        self._rich: RichConsole | None = None
        self._live: Live | None = None
        if self._out.isatty() and os.environ.get("TERM") != "dumb":
            self._rich = RichConsole(file=self._out, highlight=False, markup=False, emoji=False)

    def start(self, headline: str) -> None:
        """Prints the headline and, on a terminal, shows the table."""
        self._print(headline)
        if self._rich is not None:
            self._live = Live(
                console=self._rich,
                get_renderable=self._table,
                refresh_per_second=_REFRESH_HZ,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    def changed(self, job: Job) -> None:
        """Prints a line for the new state of a job."""
        words = [f"{job.id}  {_shown(job):<8}"]
        if job.objective is not None:
            words.append(f"held-out loss {job.objective:.6f}")
        words.append(job.name)
        if job.state == FAILED:
            words.append(f"exit code {job.exit_code}: {why_failed(job)}\n{'':8}  log: {job.log}")
        self._print("  ".join(words))

    def note(self, text: str) -> None:
        """Prints a line of its own."""
        self._print(text)

    def close(self, folder: Path) -> None:
        """Removes the live table, and prints the final table, the best job and the command that continues its run."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if not self.jobs:
            return
        ranked = sorted(self.jobs, key=_rank)
        self._print("\n" + aligned([_TITLES, *map(self._cells, ranked)]))
        if best := best_of(self.jobs):
            self._print(f"\nbest: {best.measure} {best.value:.6f}  {best.job.name}")
            self._print(f"to continue this run: {best.command}")
        counts = Counter(job.state for job in self.jobs)
        told = ", ".join(f"{counts[state]} {state}" for state in (DONE, FAILED, STOPPED, WAITING) if counts[state])
        self._print(f"\n{told}: {folder / 'sweep.jsonl'}")

    def _table(self) -> Text:
        rows = [self._cells(job) for job in sorted(self.jobs, key=lambda job: _ORDER.index(job.state))]
        return Text(aligned([_TITLES, *rows]), no_wrap=True, overflow="crop")

    def _cells(self, job: Job) -> Sequence[str]:
        last = self._last(job)
        return (
            job.id,
            _shown(job),
            f"{last.step if last else 0}/{job.cfg.train.steps}",
            f"{last.loss:.4f}" if last and last.step else "",
            f"{job.objective:.6f}" if job.objective is not None else "",
            _clock(job),
            job.name,
        )

    def _last(self, job: Job) -> StepRecord | None:
        """The newest row of the job's run."""
        run = job.run
        if run is None:
            return None
        # The job itself reports faults of the file.
        follower, seen = self._rows.setdefault(run.path, (Follower(run.metrics), []))
        seen[:] = (seen + follower.poll())[-1:]
        return seen[-1] if seen else None

    def _print(self, text: str) -> None:
        if self._rich is not None:
            self._rich.print(Text(text), soft_wrap=True)
        else:
            self._out.write(text + "\n")
        self._out.flush()


def _rank(job: Job) -> tuple[float, float, int]:
    """Sort key: the lowest held-out loss first, then the lowest training loss, then the jobs that have neither."""
    heldout, loss = (math.inf if loss is None else loss for loss in (job.objective, job.loss))
    return heldout, loss, _ORDER[::-1].index(job.state)


def _shown(job: Job) -> str:
    """The state of a job, or for a running or skipped job what this command did with it."""
    told = job.state == RUNNING or job.how == "skipped"
    return job.how if told and job.how else job.state


def _clock(job: Job) -> str:
    if job.started is None:
        return ""
    return str(timedelta(seconds=round((job.ended or time.time()) - job.started)))
