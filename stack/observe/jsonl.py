"""Writes and reads metrics.jsonl, the complete record of a run's steps. Rank 0 writes it; others may read it while it
grows."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from stack.disk import read_regular
from stack.errors import StackError
from stack.observe.lines import Lines, Tail
from stack.observe.metrics import StepRecord


class MetricsWriter:
    """Appends rows to a file through `Lines`, so that neither a full disk nor a removed file ends the run."""

    def __init__(self, path: Path, *, tell: Callable[[str], object] = lambda _: None) -> None:
        """
        Args:
            path, tell: as of `Lines`.

        Raises:
            OSError: the file cannot be opened.
        """
        self._lines = Lines(path, tell=tell)

    def write(self, record: StepRecord) -> None:
        """Appends one row and writes it through to the operating system, so that a reader sees it at once."""
        self._lines.add(record.to_json().encode("ascii"))

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path, *, skipped: Callable[[str], object] | None = None) -> list[StepRecord]:
    """All rows of a file, of all attempts, in the order of the file. A last line without a newline is left out.

    Args:
        path: the file.
        skipped: called with a line for the user about the first line that is no row; such lines are left out.

    Raises:
        StackError: a line is no row and `skipped` is None; the message has the file and the number of the line.
        OSError: the file cannot be read.
    """
    records, faults = _parse(path, read_regular(path).split(b"\n")[:-1], first_line=1)
    if faults:
        if skipped is None:
            raise StackError(f"{faults[0]}; delete that line to go on")
        skipped(f"{faults[0]}; the line is skipped{_more(faults)}")
    return records


def latest(records: Iterable[StepRecord]) -> list[StepRecord]:
    """The rows that count, in the order of steps: a row of a later attempt replaces earlier rows of the same step and
    of later steps."""
    kept: list[StepRecord] = []
    for record in records:
        while kept and kept[-1].step >= record.step:
            kept.pop()
        kept.append(record)
    return kept


class Follower:
    """Reads the new rows of a metrics.jsonl while another process writes them. The file need not exist yet.

    A damaged, cut or removed file raises no error: lines that are no rows are left out, and rows that were returned
    before are not returned again.
    """

    def __init__(self, path: Path, *, from_end: bool = False, tell: Callable[[str], object] = lambda _: None) -> None:
        """
        Args:
            path: the file.
            from_end: leave out the rows that the file has now.
            tell: called with a line for the user about the first line that is no row.
        """
        self._path, self._tail, self._tell = path, Tail(path), tell
        self._told = False
        self._last: tuple[int, int] = (0, 0)
        """(attempt, step) of the newest row. The pairs increase within a file."""
        self._restarts = 0
        if from_end:
            records, _ = _parse(path, self._tail.poll()[-1:], first_line=0)
            self._last = max((_order(record) for record in records), default=self._last)

    def poll(self) -> list[StepRecord]:
        """The rows that were completed since the last call."""
        lines = self._tail.poll()
        records, faults = _parse(self._path, lines, first_line=self._tail.lines - len(lines) + 1)
        if faults and not self._told:
            self._told = True
            self._tell(f"{faults[0]}; lines that are no rows are skipped")
        if self._tail.restarts > self._restarts:
            records = [record for record in records if _order(record) > self._last]
            self._restarts = self._tail.restarts
        self._last = max((_order(record) for record in records), default=self._last)
        return records


def _order(record: StepRecord) -> tuple[int, int]:
    return record.attempt, record.step


def _parse(path: Path, lines: list[bytes], first_line: int) -> tuple[list[StepRecord], list[str]]:
    """The rows, and a message for each line that is no row."""
    records, faults = [], []
    for number, line in enumerate(lines, first_line):
        try:
            records.append(StepRecord.from_json(line))
        except ValueError as error:
            faults.append(f"{path}:{number} is not a metrics row: {error}")
    return records, faults


def _more(faults: list[str]) -> str:
    return f", and so are {len(faults) - 1} more" if faults[1:] else ""
