"""Start and death of the quickstart's ranks: `python -m benchmarks.quickstart [--before CHECKOUT]`.

A trial starts the quickstart, waits for the first row of metrics.jsonl, and kills one rank with SIGKILL. It measures
the seconds from the command to config.yaml, from config.yaml to the first row, from SIGKILL until the driver knows
(`time` in FAILED.json), and from SIGKILL until the driver has ended together with all ranks. The first trial is not
counted: it makes the corpus and fills the caches.

With --before, another checkout of stack is measured in turn with this one, by the same interpreter.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks.process import ROOT, BenchmarkError

#: Enough steps that the run is alive when the rank is killed.
_QUICKSTART = ("experiment=quickstart", "train.steps=100000", "train.eval_every=0", "log=wandb_disabled")
#: Longest wait for a start or an end, in seconds.
_TIMEOUT_S = 300.0
_POLL_S = 0.01
_T = TypeVar("_T")


def trial(checkout: Path, folder: Path, data: Path) -> dict[str, float]:
    """One start and one death; returns the seconds of each interval.

    Args:
        checkout: folder that has the package `stack`.
        folder: empty folder for the run.
        data: folder for the corpus.

    Raises:
        BenchmarkError: the run did not start, or did not end.
    """
    output = folder / "output.txt"
    folders = (f"run.root={folder / 'runs'}", f"data.root={data}")
    began = time.time()
    with output.open("wb") as file:
        driver = subprocess.Popen(
            [sys.executable, "-P", "-m", "stack", "train", *_QUICKSTART, *folders],
            env={**os.environ, "PYTHONPATH": str(checkout)},
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
        )

    def wait(found: Callable[[], _T]) -> _T:
        deadline = time.monotonic() + _TIMEOUT_S
        while not (value := found()):
            if driver.poll() is not None or time.monotonic() > deadline:
                driver.terminate()
                raise BenchmarkError(f"{checkout}: the quickstart did not start\n{output.read_text()}")
            time.sleep(_POLL_S)
        return value

    config = wait(lambda: next(folder.glob("runs/*/*/config.yaml"), None))
    run = config.parent
    composed = config.stat().st_mtime
    row = wait(lambda: _first_row(run / "metrics.jsonl"))
    os.kill(json.loads((run / "ranks" / "1" / "rank.json").read_text())["pid"], signal.SIGKILL)
    killed = time.time()
    driver.wait(_TIMEOUT_S)
    ended = time.time()
    return {
        "command to config.yaml": composed - began,
        "config.yaml to the first row": json.loads(row)["time"] - composed,
        "SIGKILL to the driver's knowledge": json.loads((run / "FAILED.json").read_text())["time"] - killed,
        "SIGKILL to the driver's exit": ended - killed,
    }


def _first_row(metrics: Path) -> str:
    """The first row, or an empty string until it is complete."""
    rows = metrics.read_text() if metrics.exists() else ""
    return rows.split("\n", 1)[0] if "\n" in rows else ""


def main() -> int:
    """Prints the median and the spread of each interval."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quickstart", description=__doc__)
    parser.add_argument("--before", type=Path, help="another checkout, measured in turn with this one")
    parser.add_argument("--trials", type=int, default=5, help="trials that count, of each checkout (default 5)")
    arguments = parser.parse_args()
    checkouts = [ROOT, *([arguments.before.resolve()] if arguments.before else [])]
    found: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(arguments.trials + 1):
            for which, checkout in enumerate(checkouts):
                folder = Path(temporary) / f"{which}-{number}"
                folder.mkdir()
                found[checkout].append(trial(checkout, folder, Path(temporary) / f"data-{which}"))
                print(f"trial {number} of {checkout}: {_shown(found[checkout][-1])}", flush=True)
    medians = {}
    for checkout, trials in found.items():
        for what in trials[0]:
            seconds = sorted(intervals[what] for intervals in trials[1:])
            medians[checkout, what] = statistics.median(seconds)
            print(
                f"{checkout}: {what}: median {medians[checkout, what]:.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f} s)"
            )
    for checkout in checkouts[1:]:
        for what in found[checkout][0]:
            print(f"{what}: {medians[ROOT, what] / medians[checkout, what]:.2f} of {checkout}")
    return 0


def _shown(intervals: dict[str, float]) -> str:
    return ", ".join(f"{what} {seconds:.2f} s" for what, seconds in intervals.items())


if __name__ == "__main__":
    sys.exit(main())
