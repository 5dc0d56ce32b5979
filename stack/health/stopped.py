"""A rank that is told to end says so first: whoever looks for the one that failed can then tell them apart."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable

#: What a shell adds to the number of the signal that ended a command.
SIGNALLED = 128
#: What asks a rank to save and end; SIGUSR1 is the one that srun passes on, and that jobs on Slurm like to be sent.
_REQUESTS = (signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """What comes of the signals to a rank. SIGINT ends it at once with 130; SIGTERM and SIGUSR1 do so too, with 128 and
    their number, until `wait_for_step` says that somebody will ask for them.

    A launcher also sends SIGTERM to all its ranks once one of them has failed. Python would run a handler only when the
    main thread comes back from its collective, which it then never does; a thread that reads what the signal writes
    runs at once.
    """

    def __init__(self, tell: Callable[[], object], *, leave: Callable[[], object] = lambda: None) -> None:
        """For the main thread. From now on a signal that ends or asks calls `tell` first, and one that ends the process
        then calls `leave`."""
        self._tell, self._leave, self._waits, self._asked = tell, leave, False, False
        told, telling = os.pipe()
        # A full pipe must not hold up a signal.
        os.set_blocking(telling, False)
        for number in (signal.SIGINT, *_REQUESTS):
            # Without a handler of Python's own the signal would write nothing, and end the process.
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(told,), daemon=True, name="stop-watch").start()

    def wait_for_step(self) -> None:
        """From now on a request to save and end only shows in `asked`, which is looked at after each step."""
        self._waits = True

    def asked(self) -> bool:
        """Whether this rank was asked to save and end."""
        return self._asked

    def _watch(self, told: int) -> None:
        while True:
            for number in os.read(told, 64):
                if number == signal.SIGINT or number in _REQUESTS:
                    self._take(number)

    def _take(self, number: int) -> None:
        # A full disk must not keep the rank.
        with contextlib.suppress(OSError):
            self._tell()
        if number == signal.SIGINT or not self._waits:
            self._leave()
            os._exit(SIGNALLED + number)
        self._asked = True
