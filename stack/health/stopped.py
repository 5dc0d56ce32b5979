"""Handles the signals that end a rank. The rank first records that it was told to end, so that it is not taken for the
rank that failed."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable

#: Added to the number of a signal for the exit code, as shells do.
SIGNALLED = 128
#: Signals that ask a rank to save and end. SIGUSR1 is what srun passes on to its tasks, and what Slurm jobs often get.
_REQUESTS = (signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Handles the signals to a rank. SIGINT ends the rank at once with exit code 130. SIGTERM and SIGUSR1 end it with
    128 plus their number until `wait_for_step` is called; after that they only set `asked`.

    A launcher also sends SIGTERM to all its ranks once one of them has failed. The main thread may then wait in a
    collective for ever, and Python would not run a signal handler before the collective returns. So a thread reads the
    number of the signal from `signal.set_wakeup_fd`, which Python writes at once.
    """

    def __init__(self, tell: Callable[[], object], *, leave: Callable[[], object] = lambda: None) -> None:
        """Is called in the main thread. From now on each handled signal calls `tell` first; a signal that ends the
        process then calls `leave`."""
        self._tell, self._leave, self._waits, self._asked = tell, leave, False, False
        told, telling = os.pipe()
        # A full pipe must not hold up a signal.
        os.set_blocking(telling, False)
        for number in (signal.SIGINT, *_REQUESTS):
            # Without a Python handler the signal would end the process and write nothing to the pipe.
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(told,), daemon=True, name="stop-watch").start()

    def wait_for_step(self) -> None:
        """From now on a request to save and end only sets `asked`, which the training loop reads after each step."""
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
        # A full disk must not keep the rank from ending.
        with contextlib.suppress(OSError):
            self._tell()
        if number == signal.SIGINT or not self._waits:
            self._leave()
            os._exit(SIGNALLED + number)
        self._asked = True
