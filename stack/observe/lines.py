"""Files to which one process appends lines while others read them: metrics.jsonl, notes.txt.

A line is complete when its newline is in the file. Text after the last newline is an unfinished line, or one that a
crash cut off. Readers ignore it, and the next writer removes it.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from stack import disk

_BLOCK = 1 << 16


class Lines:
    """Appends lines to a file. Neither a full disk nor a removed file ends the process that appends.

    Lines that a full disk does not take are kept in memory without a limit (a row of metrics.jsonl has about 400 bytes,
    so a million steps need 400 MB). They are written, in order, as soon as the disk takes lines again. A file that was
    removed or replaced meanwhile is created again, and has only the lines from then on. Only one process may append to
    a file; methods may be called from any thread.
    """

    def __init__(self, path: Path, *, tell: Callable[[str], object] = lambda _: None) -> None:
        """
        Args:
            path: the file; its folder must exist. A last line without a newline is removed.
            tell: called with a line for the user when the disk stops taking lines, when it takes lines again, and when
                the file was removed, replaced or changed.

        Raises:
            OSError: the file cannot be opened.
        """
        self._path, self._tell = path, tell
        self._file = _open(path)
        _cut_torn_tail(self._file)
        self._size = self._file.seek(0, os.SEEK_END)
        self._waiting: deque[bytes] = deque()
        self._begun = 0
        """Number of bytes of the first waiting line that are in the file already."""
        self._full = False
        self._using = threading.Lock()

    def add(self, line: bytes) -> bool:
        """Appends a line (without its newline) and writes it through to the operating system, so that a reader sees it
        at once. Returns whether the disk has taken all lines so far."""
        with self._using:
            self._waiting.append(line + b"\n")
        return self.flush()

    def flush(self) -> bool:
        """Tries to write the lines that the disk has not taken yet. Returns whether it has taken all lines."""
        with self._using:
            told = self._write() if self._waiting else []
        # Called without the lock, because `tell` may add a line to this file.
        for text in told:
            self._tell(text)
        return not self._waiting

    def close(self) -> None:
        """Tries to write the waiting lines once more, reports how many are lost, and closes the file."""
        if not self.flush():
            self._tell(f"{len(self._waiting)} lines of {self._path} are lost, because they could not be written")
        self._file.close()

    def _write(self) -> list[str]:
        """Writes the waiting lines as far as the disk takes them. Returns lines for the user."""
        told = []
        try:
            told += self._look()
            while self._waiting:
                count = self._file.write(self._waiting[0][self._begun :])
                self._begun, self._size = self._begun + count, self._size + count
                if self._begun == len(self._waiting[0]):
                    self._waiting.popleft()
                    self._begun = 0
        except OSError as error:
            if not self._full:
                self._full = True
                told.append(f"{self._path} cannot be written ({error.strerror}): new lines are kept in memory")
            return told
        if self._full:
            self._full = False
            told.append(f"{self._path} can be written again, and has the lines that were kept in memory")
        return told

    def _look(self) -> list[str]:
        """Opens the path again if the file was removed or replaced. Begins a new line if another process has changed
        the end of the file. Returns lines for the user."""
        now = os.fstat(self._file.fileno())
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            there = None
        if (there is None and self._path.parent.is_dir()) or (there and not os.path.samestat(there, now)):
            new = _open(self._path)
            self._file.close()
            self._file, self._begun = new, 0
            self._end_line()
            return [f"{self._path} was removed or replaced: earlier lines are lost, the new file begins with this line"]
        # If the whole folder was moved, the path does not exist any more, and the open file is still the right one.
        if now.st_size != self._size:
            self._begun = 0
            self._end_line()
            return [f"{self._path} was changed by another process; new lines follow at its end"]
        return []

    def _end_line(self) -> None:
        """Adds a newline if the file, which another process changed, does not end with one."""
        size = self._file.seek(0, os.SEEK_END)
        if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
            size += self._file.write(b"\n")
        self._size = size


class Tail:
    """Reads the new lines of a file while another process writes them. The file need not exist yet."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        """
        Args:
            path: the file.
            from_end: leave out the lines that the file has now.
        """
        self._path, self._offset = path, 0
        self._file: tuple[int, int] | None = None
        self.lines = 0
        """Number of lines read from the present file."""
        self.restarts = 0
        """How often the file was found cut or replaced; it is then read from its beginning."""
        if from_end:
            self.poll()

    def poll(self) -> list[bytes]:
        """The lines that were completed since the last call, without their newlines. Empty where the file cannot be
        read; a later call tries again."""
        try:
            with disk.open_regular(self._path) as file:
                data = self._new(file)
        except OSError:
            return []
        found = data.split(b"\n")[:-1]
        self._offset += sum(len(line) + 1 for line in found)
        self.lines += len(found)
        return found

    def _new(self, file: BinaryIO) -> bytes:
        """The bytes after the last line that was read; all bytes if the file was cut or replaced."""
        about = os.fstat(file.fileno())
        before, self._file = self._file, (about.st_dev, about.st_ino)
        if not self._offset:
            return file.read()
        file.seek(self._offset - 1)
        data = file.read()
        # The byte before the offset was a newline. If it no longer is, the file was cut and has grown since.
        if self._file == before and data[:1] == b"\n":
            return data[1:]
        self._offset, self.lines, self.restarts = 0, 0, self.restarts + 1
        file.seek(0)
        return file.read()


def _open(path: Path) -> BinaryIO:
    # Unbuffered, so that the number of bytes of a line that are in the file is known.
    return path.open("a+b", buffering=0)  # type: ignore[return-value]


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
