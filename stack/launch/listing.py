"""`stack ls`: a table of the runs below a folder, also of running ones. Reads only the end of each metrics.jsonl."""

import os
import re
import time
from pathlib import Path

from stack.disk import open_regular, read_regular
from stack.errors import UsageError
from stack.launch.standing import RUNNING, standing
from stack.observe.metrics import StepRecord
from stack.observe.table import aligned
from stack.train.lock import Holder
from stack.train.rundir import RunDir

_TITLES = ("run", "state", "step", "loss", "held-out", "tokens/s", "left", "age", "")
#: Bytes read from the end of metrics.jsonl: some hundred rows, enough for the pace and the last held-out loss.
_TAIL_BYTES = 1 << 16
#: Finds `train.steps` in the text of a config.yaml that stack wrote. Reading with the schema takes 20 ms a run.
_STEPS = re.compile(rb"^train:\n(?:  .*\n)*?  steps: (\d+)$", re.MULTILINE)


def listing(root: Path) -> str:
    """A row for each run in `root`, in a folder of `root`, or in the job folders of a sweep; the newest last.

    Raises:
        UsageError: the folder cannot be read.
    """
    # Path.is_dir raises an error for a name that is too long.
    if not os.path.isdir(root):
        raise UsageError(f"{root} is no folder; write stack ls RUNS, where RUNS is the run.root of the runs")
    patterns = ("*/config.yaml", "*/*/config.yaml", *(["*/*/*/config.yaml"] if (root / "sweep.jsonl").exists() else []))
    runs = [RunDir(file.parent) for pattern in patterns for file in root.glob(pattern)]
    # Evaluations and the doctor's checks have run directories too.
    runs = [run for run in runs if run.trains]
    if not runs:
        return f"no runs in {root}"
    me = Holder.me()
    rows = [(_started(run), _row(run, root, me)) for run in runs]
    return aligned([_TITLES, *(row for _, row in sorted(rows))])


def _row(run: RunDir, root: Path, me: Holder) -> tuple[str, ...]:
    found = standing(run, me)
    total, lines = _steps(run), _tail(run.metrics)
    last = _parsed(lines[-1]) if lines else None
    # Rows without a held-out loss do not contain the name, so few rows are parsed.
    evaluated = filter(None, (_parsed(line) for line in reversed(lines) if b'"heldout_loss"' in line))
    heldout = next((row.heldout_loss for row in evaluated if row.heldout_loss is not None), None)
    return (
        str(run.path.relative_to(root)),
        found.state,
        f"{last.step if last else 0}/{'?' if total is None else total}",
        f"{last.loss:.4f}" if last and last.step else "damaged" if lines and not last else "",
        "" if heldout is None else f"{heldout:.4f}",
        f"{last.tokens_per_s:,.0f}" if last and last.step else "",
        _left(lines, last, total) if found.state == RUNNING and last else "",
        _clock(time.time() - _started(run)),
        found.why,
    )


def _steps(run: RunDir) -> int | None:
    try:
        found = _STEPS.search(read_regular(run.config))
    except OSError:
        return None
    return int(found[1][:18]) if found else None


def _tail(path: Path) -> list[bytes]:
    """The finished lines at the end of a metrics.jsonl; none where it cannot be read."""
    try:
        with open_regular(path) as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return []
    # When reading begins inside the file, the first line may lack its beginning.
    return lines[1:] if start and len(lines) > 1 else lines


def _parsed(line: bytes) -> StepRecord | None:
    """The row in a line; None if the line is no row."""
    try:
        return StepRecord.from_json(line)
    except ValueError:
        return None


def _left(lines: list[bytes], last: StepRecord, total: int | None) -> str:
    """Time to the last step, at the pace of this attempt's last rows, evaluations and saves included."""
    same = (row for line in lines if (row := _parsed(line)) and row.attempt == last.attempt)
    first = next(same, last)
    steps = last.step - first.step
    if total is None or steps <= 0:
        return ""
    return _clock((total - last.step) * (last.time - first.time) / steps)


def _started(run: RunDir) -> float:
    """`RunDir.started`; 0 for a run that was removed while the table is made."""
    try:
        return run.started
    except OSError:
        return 0.0


def _clock(seconds: float) -> str:
    """The two largest of days, hours, minutes and seconds."""
    minutes, second = divmod(int(max(0.0, min(seconds, 1e12))), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}h"
    if hours:
        return f"{hours}h {minute:02}m"
    return f"{minute}m {second:02}s"
