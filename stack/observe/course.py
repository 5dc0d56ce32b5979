"""Summary figures of a run, updated with each row."""

from array import array
from dataclasses import dataclass

from stack.observe.metrics import StepRecord


@dataclass(frozen=True)
class StageTime:
    """The computing time of one rank of the pipe, as means over the steps of an attempt and over replicas."""

    stage: int
    """Number of the rank in the pipe, from 0."""
    busy_s: float
    """Seconds of a step in which the rank computed."""
    busy_fraction: float
    """`busy_s` over the duration of a step, 0 to 1."""


class Course:
    """Figures over the steps that count: when a later attempt repeats a step, the row of the later attempt replaces the
    earlier one.

    Needs 24 bytes of memory for each step.
    """

    def __init__(self, started: float) -> None:
        """`started` is the beginning of the first attempt in Unix seconds."""
        self._started = started
        self._steps, self._seconds, self._best = array("q"), array("d"), array("d")
        self._last: StepRecord | None = None
        self._memory_peak = 0
        self._stages: list[float] = []
        self._stages_s, self._stage_steps = 0.0, 0

    def add(self, record: StepRecord) -> None:
        """Adds the next row of metrics.jsonl."""
        while self._steps and self._steps[-1] >= record.step:
            for kept in (self._steps, self._seconds, self._best):
                kept.pop()
        if self._last is None or record.attempt != self._last.attempt or self._last.step == 0:
            self._stages = [0.0] * len(record.stage_busy_s or ())
            self._stages_s, self._stage_steps = 0.0, 0
        spent = self._seconds[-1] if self._seconds else 0.0
        best = self._best[-1] if self._best else float("inf")
        self._steps.append(record.step)
        self._seconds.append(spent + record.step_time_s)
        self._best.append(best if record.heldout_loss is None else min(best, record.heldout_loss))
        if record.stage_busy_s is not None:
            self._stages = [sum(both) for both in zip(self._stages, record.stage_busy_s, strict=True)]
        self._stages_s, self._stage_steps = self._stages_s + record.step_time_s, self._stage_steps + 1
        self._memory_peak = max(self._memory_peak, record.memory_peak_bytes)
        self._last = record

    def summary(self) -> dict[str, int | float]:
        """The figures of the whole run; empty before the first step is done. Losses are in nats per token.

        goodput: the share of the wall-clock time since the beginning of the first attempt that was spent in steps that
            count. Starts, evaluations, saves, steps that a later attempt repeated, and the time between attempts are
            the rest.
        """
        if self._last is None or self._last.step == 0:
            return {}
        figures: dict[str, int | float] = {
            "final_loss": self._last.loss,
            "tokens_seen": self._last.tokens_total,
            "goodput": self._seconds[-1] / max(self._last.time - self._started, self._seconds[-1]),
            "peak_memory_bytes": self._memory_peak,
            "attempts": self._last.attempt,
        }
        if self._best[-1] != float("inf"):
            figures["best_heldout_loss"] = self._best[-1]
        return figures

    def stages(self) -> list[StageTime]:
        """One entry for each rank of the pipe, over the steps of the newest attempt; empty without a pipeline."""
        return [
            StageTime(stage, busy_s / self._stage_steps, busy_s / self._stages_s)
            for stage, busy_s in enumerate(self._stages)
        ]
