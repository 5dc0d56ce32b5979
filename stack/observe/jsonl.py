"""metrics.jsonl: the truth about a run, written by one rank and read while it grows; a row is a line of `lines`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from stack.disk import read_regular
from stack.errors import StackError
from stack.observe.lines import Lines, Tail
from stack.observe.metrics import StepRecord


class MetricsWriter:
    """Appends rows to `path`, as `Lines`: neither a full disk nor a removed file ends the run.

    Raises OSError when the file cannot be opened.
    """

    def __init__(self, path: Path, *, tell: Callable[[str], object] = lambda _: None) -> None:
        """
        Args:
            tell: as of `Lines`.
        """
        self._lines = Lines(path, tell=tell)

    def write(self, record: StepRecord) -> None:
        """Appends one row and hands it to the operating system, so that a follower sees it at once."""
        self._lines.add(record.to_json().encode("ascii"))

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path, *, skipped: Callable[[str], object] | None = None) -> list[StepRecord]:
    """All rows of a file, of all attempts, in the order they were written; a torn last line is left out.

    Args:
        skipped: takes a line for the user on the first finished line that is no row; those lines are left out.

    Raises StackError with file and line when a finished line is not a row and there is no `skipped`, OSError when the
    file cannot be read.
    """
    records, faults = _parse(path, read_regular(path).split(b"\n")[:-1], first_line=1)
    if faults:
        if skipped is None:
            raise StackError(f"{faults[0]}; delete that line to go on")
        skipped(f"{faults[0]}; it is left out{_more(faults)}")
    return records


def latest(records: Iterable[StepRecord]) -> list[StepRecord]:
    """The run as it went in the end: a step that a later attempt repeats takes the place of the earlier ones from
    there on, so `step` rises strictly."""
    kept: list[StepRecord] = []
    for record in records:
        while kept and kept[-1].step >= record.step:
            kept.pop()
        kept.append(record)
    return kept


class Follower:
    """Reads the new rows of a metrics.jsonl while another process writes them. The file may appear later.

    A file that is damaged, cut short or removed ends nobody who follows it: lines that are no rows are left out, and
    rows that were read before are not given again.
    """

    def __init__(self, path: Path, *, from_end: bool = False, tell: Callable[[str], object] = lambda _: None) -> None:
        """
        Args:
            from_end: leave out the rows that are there now.
            tell: takes a line for the user on the first line that is no row.
        """
        self._path, self._tail, self._tell = path, Tail(path), tell
        self._told = False
        self._last: tuple[int, int] = (0, 0)
        """(attempt, step) of the newest row; both never fall within a file."""
        self._restarts = 0
        if from_end:
            records, _ = _parse(path, self._tail.poll()[-1:], first_line=0)
            self._last = max((_order(record) for record in records), default=self._last)

    def poll(self) -> list[StepRecord]:
        """The rows finished since the last call; never a part of one."""
        lines = self._tail.poll()
        records, faults = _parse(self._path, lines, first_line=self._tail.lines - len(lines) + 1)
        if faults and not self._told:
            self._told = True
            self._tell(f"{faults[0]}; lines that are no rows are left out")
        if self._tail.restarts > self._restarts:
            records = [record for record in records if _order(record) > self._last]
            self._restarts = self._tail.restarts
        self._last = max((_order(record) for record in records), default=self._last)
        return records


def _order(record: StepRecord) -> tuple[int, int]:
    return record.attempt, record.step


def _parse(path: Path, lines: list[bytes], first_line: int) -> tuple[list[StepRecord], list[str]]:
    """The rows, and what is wrong with each line that is none."""
    records, faults = [], []
    for number, line in enumerate(lines, first_line):
        try:
            records.append(StepRecord.from_json(line))
        except ValueError as error:
            faults.append(f"{path}:{number} is not a metrics row: {error}")
    return records, faults


def _more(faults: list[str]) -> str:
    return f", and so are {len(faults) - 1} more" if faults[1:] else ""
