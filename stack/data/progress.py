"""Progress of `stack data`: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_INTERVAL_S = 5.0


def say(text: str) -> None:
    """Prints one line to stderr and flushes it."""
    print(f"data: {text}", file=sys.stderr, flush=True)


class Meter:
    """Counts documents, text bytes and tokens and shows them on stderr; a context manager.

    `total` is the expected size in `unit`s. Where it is None or proves too small, the bar shows no end. Without `show`
    nothing is printed.
    """

    def __init__(self, total: int | None, unit: Literal["bytes", "documents"], *, show: bool) -> None:
        self.total, self.unit, self.show = total, unit, show
        self.documents = self.bytes = self.tokens = 0
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if show and sys.stderr.isatty():
            columns = (TextColumn("data"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total, text="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            if error is None:
                done = self._done()
                self._bar.update(self._task, completed=done, total=done)
            self._bar.stop()
        elif self.show and error is None:
            say(self._text())

    def advance(self, *, documents: int, bytes: int, tokens: int) -> None:
        """Adds a number of finished documents, of bytes of text in UTF-8, and of tokens."""
        self.documents += documents
        self.bytes += bytes
        self.tokens += tokens
        done = self._done()
        if self.total is not None and done > self.total:
            self.total = None
        if self._bar:
            self._bar.update(self._task, completed=done, total=self.total, text=self._text())
        elif self.show and time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            share = f"{100 * done / self.total:.0f} %, " if self.total else ""
            say(share + self._text())

    def _done(self) -> int:
        return self.bytes if self.unit == "bytes" else self.documents

    def _text(self) -> str:
        rate = self.bytes / 1e6 / max(time.monotonic() - self._started, 1e-9)
        return f"{self.documents:,} documents, {self.tokens / 1e6:,.2f} M tokens, {rate:.1f} MB/s"
