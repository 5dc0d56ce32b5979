"""Sends the output of a rank to its log.txt. A full disk or a closed screen must not end the run."""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import TextIO, cast

#: The replaced streams, kept alive: a deleted stream would close the descriptor that the new stream writes to.
_REPLACED: list[TextIO] = []


def own_output(log: Path, *, shown: bool) -> TextIO | None:
    """Sends all output of this process, also that of libraries in C, to a file.

    Args:
        log: the file; output is appended.
        shown: whether the previous standard output is returned.

    Returns:
        The previous standard output if `shown`, else None.

    Raises:
        OSError: the file cannot be opened.
    """
    screen = _stream(os.dup(sys.stdout.fileno())) if shown else None
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with contextlib.suppress(OSError):
            stream.flush()
        os.dup2(descriptor, stream.fileno())
        _REPLACED.append(stream)
        setattr(sys, name, _stream(stream.fileno()))
    os.close(descriptor)
    return screen


class _Lossy(io.FileIO):
    """A file whose writes never fail. Bytes that the disk or the reader does not take are dropped; the next successful
    write says how many."""

    _lost = 0

    def write(self, data: object) -> int:
        size = memoryview(data).nbytes  # type: ignore[arg-type]
        try:
            if self._lost:
                super().write(f"\n[{self._lost} bytes are missing here: the disk was full]\n".encode())
                self._lost = 0
            return super().write(data)  # type: ignore[arg-type]
        except OSError:
            self._lost += size
            return size


def _stream(descriptor: int) -> TextIO:
    """A line-buffered text stream; characters that cannot be encoded are escaped."""
    raw = _Lossy(descriptor, "w", closefd=False)
    buffered = io.BufferedWriter(cast("io.RawIOBase", raw))
    return io.TextIOWrapper(buffered, encoding="utf-8", errors="backslashreplace", line_buffering=True)
