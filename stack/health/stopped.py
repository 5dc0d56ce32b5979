"""A rank that is told to end says so first: whoever looks for the one that failed can then tell them apart."""

import os
import signal
import threading
from collections.abc import Callable

#: What a shell adds to the number of the signal that ended a command.
SIGNALLED = 128


def tell_when_stopped(tell: Callable[[], object]) -> None:
    """From now on SIGTERM calls `tell` and then ends this process with 143. For the main thread.

    A launcher sends SIGTERM to all its ranks once one of them has failed. Python would run a handler only when the main
    thread comes back from its collective, which it never does; a thread that reads what the signal writes runs at once.
    """
    told, telling = os.pipe()
    # A full pipe must not hold up a signal.
    os.set_blocking(telling, False)
    # Without a handler of Python's own the signal would write nothing, and end the process.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
    threading.Thread(target=_end, args=(told, tell), daemon=True, name="stop-watch").start()


def _end(told: int, tell: Callable[[], object]) -> None:
    while signal.SIGTERM not in os.read(told, 64):
        pass
    try:
        tell()
    finally:
        os._exit(SIGNALLED + signal.SIGTERM)
