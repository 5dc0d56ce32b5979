"""Makes rows of metrics.jsonl without a run."""

from typing import Any

from stack.observe.metrics import StepRecord


def row(step: int, **changed: Any) -> StepRecord:
    values = {
        "step": step,
        "loss": 8.25 / step,
        "grad_norm": 1.5,
        "lr": 1e-3,
        "tokens": 16320,
        "tokens_total": 16320 * step,
        "tokens_per_s": 5440.4,
        "step_time_s": 3.0,
        "mfu": None,
        "bubble_fraction": 0.1234,
        "memory_peak_bytes": 3 << 29,
        "skipped_steps": 0,
        "attempt": 1,
        "time": 1000.0 + 3 * step,
    }
    return StepRecord(**{**values, **changed})
