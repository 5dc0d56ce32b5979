"""Being asked to end."""

import contextlib
import signal
from collections.abc import Iterator


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
