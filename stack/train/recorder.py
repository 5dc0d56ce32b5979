"""Sends the rows of a run to metrics.jsonl, the screen and W&B, and draws the curve at the end."""

from types import TracebackType
from typing import Self, TextIO

import torch

from stack import disk
from stack.config.schema import Config
from stack.errors import Requeue, StackError
from stack.observe.console import Console
from stack.observe.curve import draw
from stack.observe.jsonl import MetricsWriter, read
from stack.observe.lines import Lines
from stack.observe.metrics import StepRecord, mfu, peak_flops
from stack.observe.wandb.sink import WandbSink
from stack.parallel.engine import Engine
from stack.parallel.step import StepResult
from stack.plan.layout import Plan
from stack.train import rundir
from stack.train.ranks import Launched
from stack.train.rundir import RunDir
from stack.train.tracking import facts


class Recorder:
    """The outputs of rank 0. On other ranks every method returns at once, except that the first rank of each host may
    send system metrics to W&B (`log.wandb.mode=shared`)."""

    def __init__(
        self, cfg: Config, plan: Plan, run: RunDir, engine: Engine, *, launched: Launched, screen: TextIO | None
    ):
        """
        Args:
            cfg: the config.
            plan: the layout.
            run: the run directory.
            engine: this rank's engine.
            launched: this rank's place.
            screen: stream for lines for the user, or None where a driver shows metrics.jsonl.
        """
        self._run, self._plan, self._engine, self._name = run, plan, engine, cfg.run.name
        self._writes = launched.rank == 0
        self._peak = _device_peak(cfg.precision.dtype)
        self._first = True
        self._wandb: WandbSink | None = None
        if not self._writes:
            if launched.host and launched.local_rank == 0:
                self._wandb = WandbSink(facts(run, cfg), cfg.log.wandb, note=print, node=launched.host)
            return
        rundir.write_json(run.ds_config, engine.ds_config)
        # Reserves room for the note that the disk is full, or for the file that says how the run ended.
        disk.reserve(run.path)
        self._notes = Lines(run.notes)
        self._metrics = MetricsWriter(run.metrics, tell=self.note)
        self._console = Console(cfg.train.steps, log_every=cfg.train.log_every, out=screen) if screen else None
        if self._console:
            self._console.start(f"run {run.path}")
        self._wandb = WandbSink(facts(run, cfg), cfg.log.wandb, note=self.note)

    def __enter__(self) -> Self:
        return self

    def mfu(self, result: StepResult) -> float | None:
        """Model FLOPs utilisation of a step, 0 to 1, or None where the device's peak is not known."""
        flops = self._plan.shape.training_flops(self._plan.seq_len) * result.tokens
        return mfu(flops, result.step_time_s, self._plan.world_size, self._peak)

    def record(self, record: StepRecord) -> None:
        """Writes and shows the row of a finished step, or of the evaluation before the first step."""
        if not self._writes:
            return
        # The engine knows its dtypes after the first step, not after the evaluation of step 0.
        if self._first and record.step:
            self._first = False
            print("dtypes: " + ", ".join(f"{name} {dtype}" for name, dtype in self._engine.dtypes.items()), flush=True)
        self._metrics.write(record)
        if self._wandb:
            self._wandb.advance()
        if self._console:
            self._console.step(record)

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        drawn = False
        if self._writes:
            self._metrics.close()
            drawn = self._draw()
        if self._wandb:
            self._wandb.finish(exit_code=getattr(error, "exit_code", 1) if error else 0)
        if not self._writes:
            return
        self._notes.close()
        if self._console:
            failed = error and not isinstance(error, Requeue)
            ended = f"curve {self._run.curve}" if drawn else "done"
            self._console.close(f"failed: {error}" if failed else str(error or ended))

    def _draw(self) -> bool:
        """Draws the curve; returns whether it was drawn."""
        try:
            records = read(self._run.metrics, skipped=self.note)
            drawn = any(record.step for record in records)
            if drawn:
                title = f"{self._name}: {self._plan.summary}"
                draw(records, self._run.curve, title=title, changes=self._changes())
            return drawn
        # A failure to draw the curve must not make a finished run fail.
        except Exception as error:  # noqa: BLE001
            self.note(f"no curve: {type(error).__name__}: {error}")
            return False

    def _changes(self) -> dict[int, list[str]]:
        """Number of an attempt -> its changes of the config, each a few words."""
        try:
            return {number: [change.short for change in found] for number, found in self._run.changes().items()}
        except StackError:
            # The config of an earlier attempt is damaged; the curve then marks attempts without changes.
            return {}

    def note(self, text: str) -> None:
        """Writes a line for the user to the log, notes.txt and the screen."""
        if not self._writes:
            return
        print(text, flush=True)
        if not self._notes.add(text.encode(errors="backslashreplace")):
            # The disk is full. The reserved room is released for this first line that did not fit, and which says so.
            disk.release(self._run.path)
            self._notes.flush()
        if self._console:
            self._console.note(text)


def _device_peak(dtype: str) -> float | None:
    return peak_flops(torch.cuda.get_device_name(), dtype) if torch.cuda.is_available() else None
