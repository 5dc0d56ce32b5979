"""Being asked to end: by a signal to the driver, or by `stack stop`."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stack.health.stopped import SIGNALLED
from stack.train.rundir import RunDir
from stack.train.stop_request import StopRequests

#: A run saves on the first of these.
SAVING = (signal.SIGINT, signal.SIGTERM)


def saves(signals: Sequence[signal.Signals]) -> bool:
    """Whether what came so far asks to save before the end, and not yet to end at once."""
    return len(signals) == 1 and signals[0] in SAVING


@dataclass(frozen=True)
class Request:
    """Somebody wants a run to end."""

    by: str
    """As the user reads it."""
    saves: bool
    """After a save, where there is something to save; else at once."""
    exit_code: int
    """What the command ends with where nothing was saved."""

    @classmethod
    def of(cls, number: signal.Signals) -> "Request":
        """What a signal asks for."""
        return cls("Ctrl-C" if number == signal.SIGINT else number.name, number in SAVING, SIGNALLED + number)


class Requests:
    """All that a run was asked, in the order in which it came."""

    def __init__(self, signals: Sequence[signal.Signals], run: RunDir):
        """
        Args:
            signals: grows as they come in.
        """
        self.signals, self._taken, self._stop, self._stopped = signals, 0, StopRequests(run), ""
        self.all: list[Request] = []

    def poll(self) -> list[Request]:
        """`all`, with what is new."""
        new = self.signals[self._taken :]
        self._taken += len(new)
        self.all += [Request.of(number) for number in new]
        asked = self._stop.poll()
        if asked and asked != self._stopped:
            self._stopped = asked
            # Who only wants a save has it already, where somebody asked before.
            if asked == "now" or not self.all:
                self.all.append(Request("stack stop", asked == "save", SIGNALLED + signal.SIGTERM))
        return self.all


@contextlib.contextmanager
def stop_requests() -> Iterator[list[signal.Signals]]:
    """The signals that asked this process to end, as they come in. They interrupt nothing: however often and whenever
    a user asks, what is at work is stopped in good order. One that was ignored (nohup) stays ignored."""
    requests: list[signal.Signals] = []
    heard = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    previous = {s: signal.signal(s, lambda number, _: requests.append(signal.Signals(number))) for s in heard}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
