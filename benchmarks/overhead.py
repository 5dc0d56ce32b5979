"""Time that a run spends outside of its steps: `python -m benchmarks.overhead RUN_DIR`.

A row of metrics.jsonl has the time at which it was written and the duration of its step. The rest of the time between
two rows is spent on metrics, logging, health checks and waiting for data, if there was no evaluation or checkpoint.
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path

from stack.observe.jsonl import latest, read

#: The first steps compile, allocate and fill caches.
_WARMUP = 3


def shares(rows: list[tuple[float, float, bool]]) -> list[float]:
    """Share of the time between two rows that was not the step, for each step without evaluation or checkpoint.

    Args:
        rows: for each row the Unix time of writing, the seconds of its step, and whether there was an evaluation or a
            checkpoint.
    """
    return [
        1 - took / (end - before) for (before, *_), (end, took, evaluated) in itertools.pairwise(rows) if not evaluated
    ]


def main() -> int:
    """Prints the median and the spread."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    metrics = parser.parse_args().run / "metrics.jsonl"
    if not metrics.exists():
        parser.error(f"{metrics} does not exist; give the folder of a run")
    records = latest(read(metrics))[_WARMUP:]
    found = sorted(
        shares(
            [(r.time, r.step_time_s, r.heldout_loss is not None or r.checkpoint_stall_s is not None) for r in records]
        )
    )
    if not found:
        print("no two steps without an evaluation or a checkpoint between them", file=sys.stderr)
        return 1
    median = statistics.median(found)
    print(f"{len(found)} steps: median {median:.2%} of a step, from {found[0]:.2%} to {found[-1]:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
