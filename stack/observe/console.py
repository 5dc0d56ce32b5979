"""Shows a run on the user's screen: one aligned line for each log interval, and on a terminal a progress bar below."""

import math
import os
import sys
import time
from collections import deque
from typing import TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from stack.observe.metrics import StepRecord

#: Number of past steps from which the time left is computed: enough to average evaluations in, and few enough to follow
#: a change of pace.
_PACE_WINDOW = 50
#: Rows after which the column titles are printed again, so that the end of a long log has titles too.
_LINES_PER_HEADER = 40
_BAR_WIDTH = 20
_REFRESH_HZ = 2


class Console:
    """Prints a run of `total_steps` to `out` (standard output if None), in ASCII.

    Lines are printed every `log_every` steps, for the first and the last step, and for every step with a held-out loss.
    The bar shows the elapsed time and the time left. It hides the cursor, so call `close` after an error too.
    """

    def __init__(self, total_steps: int, *, log_every: int, out: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._log_every = log_every
        self._out = sys.stdout if out is None else out
        self._step_width = len(str(total_steps))
        self._lines = 0
        self._record: StepRecord | None = None
        self._pace: deque[tuple[float, int]] = deque(maxlen=_PACE_WINDOW)
        self._started = time.monotonic()
        self._rich: RichConsole | None = None
        self._live: Live | None = None
        # rich's own test for a terminal is not used, because it obeys FORCE_COLOR: a CI log may want colour, but it
        # cannot show a bar.
        if self._out.isatty() and os.environ.get("TERM") != "dumb":
            self._rich = RichConsole(file=self._out, force_terminal=True, highlight=False, markup=False, emoji=False)

    def start(self, headline: str) -> None:
        """Prints the headline and, on a terminal, shows the bar."""
        self._print(headline, style="bold")
        self._started = time.monotonic()
        if self._rich is not None:
            self._live = Live(
                console=self._rich,
                get_renderable=self._bar,
                refresh_per_second=_REFRESH_HZ,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    def step(self, record: StepRecord) -> None:
        """Updates the bar with the row of a finished step, and prints the row if it is due."""
        first = self._record is None or self._record.step == 0
        if self._record is not None and record.step <= self._record.step:
            self._pace.clear()  # a later attempt repeats steps, and the pace must not be computed across the jump back
        self._record = record
        self._pace.append((record.time, record.step))
        due = record.step % self._log_every == 0 or record.step == self._total_steps
        if first or due or record.heldout_loss is not None:
            self._print_row(record)

    def note(self, text: str) -> None:
        """Prints a line of text between the rows."""
        self._print(text)

    def close(self, summary: str = "") -> None:
        """Removes the bar and prints the summary, if there is one."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if summary:
            self._print(summary, style="bold")

    def _print_row(self, record: StepRecord) -> None:
        if self._lines % _LINES_PER_HEADER == 0:
            self._print(_join(_titles(self._step_width)), style="dim")
        self._lines += 1
        self._print(_join(_cells(record, self._total_steps, self._step_width)))

    def _print(self, text: str, style: str = "") -> None:
        # Characters that the stream's encoding lacks are escaped, so that printing them does not end the run.
        encoding = self._out.encoding or "ascii"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        if self._rich is not None:
            self._rich.print(Text(text, style=style), soft_wrap=True)
        else:
            self._out.write(text + "\n")
        self._out.flush()

    def _bar(self) -> Text:
        record = self._record
        done = 0 if record is None else record.step
        filled = _BAR_WIDTH * done // self._total_steps
        parts = [
            f"[{'=' * filled}{' ' * (_BAR_WIDTH - filled)}] {done:>{self._step_width}}/{self._total_steps}",
            f"{_clock(time.monotonic() - self._started)} < {self._eta()}",
        ]
        if record is not None and record.step:
            parts += [f"loss {record.loss:.4f}", f"{record.tokens_per_s:,.0f} tokens/s"]
        # Cropped, because the ellipsis that rich adds by default is not ASCII.
        return Text("  ".join(parts), style="green", no_wrap=True, overflow="crop")

    def _eta(self) -> str:
        """Time left, from the times of the last rows, so that it includes evaluations and saves."""
        if len(self._pace) < 2:
            return "-:--:--"
        (old_time, old_step), (new_time, new_step) = self._pace[0], self._pace[-1]
        return _clock((self._total_steps - new_step) * (new_time - old_time) / (new_step - old_step))


def _titles(step_width: int) -> list[str]:
    step = "step".rjust(2 * step_width + 1)
    return [step, "     loss", "grad norm", "       lr", "   tokens/s", "  s/step", "bubble", "     GiB", " held-out"]


def _cells(record: StepRecord, total_steps: int, step_width: int) -> list[str]:
    """One cell for each title of `_titles`, as wide as the title; without the last cell if there is no held-out
    loss."""
    step = f"{record.step:>{step_width}}/{total_steps}".rjust(len("step"))
    if record.step == 0:
        blank = [" " * len(title) for title in _titles(step_width)[1:-1]]
        return [step, *blank, _number(math.nan if record.heldout_loss is None else record.heldout_loss, 9, 4)]
    cells = [
        step,
        _number(record.loss, 9, 4),
        _number(record.grad_norm, 9, 4),
        f"{record.lr:9.2e}",
        f"{record.tokens_per_s:11,.0f}",
        _number(record.step_time_s, 8, 3),
        _percent(record.bubble_fraction, 6),
        f"{record.memory_peak_bytes / 2**30:8.2f}",
    ]
    if record.heldout_loss is not None:
        cells.append(_number(record.heldout_loss, 9, 4))
    return cells


def _join(cells: list[str]) -> str:
    return "  ".join(cells)


def _number(value: float, width: int, decimals: int) -> str:
    """The value in fixed point if that fits the column, else two digits and an exponent."""
    text = f"{value:.{decimals}f}"
    return (text if len(text) <= width else f"{value:.1e}").rjust(width)


def _percent(fraction: float, width: int) -> str:
    return (f"{100 * fraction:.1f}%" if math.isfinite(fraction) else "nan").rjust(width)


def _clock(seconds: float) -> str:
    """Seconds as h:mm:ss, with days in front if there are any; dashes for a value that is not finite."""
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02}:{second:02}"
