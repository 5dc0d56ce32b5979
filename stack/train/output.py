"""What a rank prints: into its log.txt, and for a bare launcher on the screen. Neither may end the run."""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import TextIO, cast

#: The streams that were replaced: the end of one would close the descriptor that its successor writes to.
_REPLACED: list[TextIO] = []


def own_output(log: Path, *, shown: bool) -> TextIO | None:
    """Sends all that this process prints, from Python or not, to a file.

    Returns:
        The output that the process had before, if `shown`.

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
    """A file that takes everything: what its disk or its reader does not take is left out, and counted in the file as
    soon as it takes something again."""

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
    """Text by lines; what cannot be encoded is escaped."""
    raw = _Lossy(descriptor, "w", closefd=False)
    buffered = io.BufferedWriter(cast("io.RawIOBase", raw))
    return io.TextIOWrapper(buffered, encoding="utf-8", errors="backslashreplace", line_buffering=True)
