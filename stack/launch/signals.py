"""Requests to end a run: by a signal to the driver, or by `stack stop`."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stack.health.stopped import SIGNALLED
from stack.train.rundir import RunDir
from stack.train.stop_request import StopRequests

#: Signals on which a run saves before it ends, if they come first.
SAVING = (signal.SIGINT, signal.SIGTERM)


def saves(signals: Sequence[signal.Signals]) -> bool:
    """Whether the signals so far ask to save before the end, and not to end at once."""
    return len(signals) == 1 and signals[0] in SAVING


@dataclass(frozen=True)
class Request:
    """A request to end a run."""

    by: str
    """Name of the source of the request in messages."""
    saves: bool
    """True: end after a save, if there is something to save. False: end at once."""
    exit_code: int
    """Exit code of the command if nothing was saved."""

    @classmethod
    def of(cls, number: signal.Signals) -> "Request":
        """The request that a signal makes."""
        return cls("Ctrl-C" if number == signal.SIGINT else number.name, number in SAVING, SIGNALLED + number)


class Requests:
    """All requests to a run, in the order in which they came."""

    def __init__(self, signals: Sequence[signal.Signals], run: RunDir):
        """
        Args:
            signals: signals to this process; the list grows as they come in.
        """
        self.signals, self._taken, self._stop, self._stopped = signals, 0, StopRequests(run), ""
        self.all: list[Request] = []

    def poll(self) -> list[Request]:
        """All requests so far, after reading new ones."""
        new = self.signals[self._taken :]
        self._taken += len(new)
        self.all += [Request.of(number) for number in new]
        asked = self._stop.poll()
        if asked and asked != self._stopped:
            self._stopped = asked
            # After an earlier request, a request to save adds nothing.
            if asked == "now" or not self.all:
                self.all.append(Request("stack stop", asked == "save", SIGNALLED + signal.SIGTERM))
        return self.all


@contextlib.contextmanager
def stop_requests() -> Iterator[list[signal.Signals]]:
    """A list of the signals that asked this process to end, which grows as they come in. The signals interrupt nothing,
    so that ranks and jobs can be stopped in the right order. A signal that was ignored (nohup) stays ignored."""
    requests: list[signal.Signals] = []
    heard = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    previous = {s: signal.signal(s, lambda number, _: requests.append(signal.Signals(number))) for s in heard}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
