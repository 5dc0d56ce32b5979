"""metrics.jsonl: the truth about a run, written by one rank and read while it grows.

A row counts once its newline is on disk. What follows the last newline is a row in the making or, after
a crash, a torn one: readers leave it alone and the next writer cuts it.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Self

from stack.errors import StackError
from stack.observe.metrics import StepRecord

_BLOCK = 1 << 16


class MetricsWriter:
    """Appends rows to `path`, which must lie in an existing folder. One writer at a time.

    Raises OSError when the file cannot be opened or, on `write`, when the disk does not take the row.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b")
        _cut_torn_tail(self._file)

    def write(self, record: StepRecord) -> None:
        """Appends one row and hands it to the operating system, so that a follower sees it at once."""
        self._file.write(record.to_json().encode("ascii") + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut_torn_tail(file: BinaryIO) -> None:
    end = file.seek(0, os.SEEK_END)
    start = end
    while start > 0:
        start = max(0, start - _BLOCK)
        file.seek(start)
        newline = file.read(min(_BLOCK, end - start)).rfind(b"\n")
        if newline >= 0:
            file.truncate(start + newline + 1)
            return
    file.truncate(0)


def read(path: Path) -> list[StepRecord]:
    """All rows of a file, of all attempts, in the order they were written; a torn last line is left out.

    Raises StackError with file and line when a finished line is not a row, OSError when the file cannot be read.
    """
    return _parse(path, path.read_bytes().split(b"\n")[:-1], first_line=1)


def latest(records: Iterable[StepRecord]) -> list[StepRecord]:
    """The run as it went in the end: a step that a later attempt repeats takes the place of the earlier ones from
    there on, so `step` rises strictly."""
    kept: list[StepRecord] = []
    for record in records:
        while kept and kept[-1].step >= record.step:
            kept.pop()
        kept.append(record)
    return kept


class Tail:
    """Reads a file's new lines while another process writes them. The file may appear later."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        """`from_end` leaves out the lines that are there now."""
        self._path, self._offset = path, 0
        if from_end:
            self.poll()

    def poll(self) -> list[bytes]:
        """The lines finished since the last call, without their newlines; never a part of one."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        lines = data.split(b"\n")[:-1]
        self._offset += sum(len(line) + 1 for line in lines)
        return lines


class Follower:
    """Reads the new rows of a metrics.jsonl while another process writes them. The file may appear later."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        """`from_end` leaves out the rows that are there now."""
        self._path, self._tail, self._lines = path, Tail(path), 0
        if from_end:
            self._lines = len(self._tail.poll())

    def poll(self) -> list[StepRecord]:
        """The rows finished since the last call; never a part of one.

        Raises StackError with file and line when a finished line is not a row.
        """
        lines = self._tail.poll()
        first, self._lines = self._lines + 1, self._lines + len(lines)
        return _parse(self._path, lines, first_line=first)


def _parse(path: Path, lines: list[bytes], first_line: int) -> list[StepRecord]:
    records = []
    for number, line in enumerate(lines, first_line):
        try:
            records.append(StepRecord.from_json(line))
        except ValueError as error:
            raise StackError(f"{path}:{number} is not a metrics row: {error}; delete that line to go on") from error
    return records
