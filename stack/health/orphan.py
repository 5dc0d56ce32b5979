"""A rank must not outlive whoever started it: the launcher, and the driver above the launcher."""

import contextlib
import os
import threading
import time

import psutil

#: Set by the driver for the ranks on its own host: the driver's process id.
DRIVER_PID = "STACK_DRIVER_PID"
_POLL_S = 0.5


def exit_with_parent() -> None:
    """Starts a thread that ends this process, without collectives, once its parent or the driver is gone.

    The launcher ends its ranks when it is told to; a launcher or driver that was killed tells nobody.
    """
    watched = [psutil.Process(os.getppid())]
    with contextlib.suppress(KeyError, psutil.NoSuchProcess):
        watched.append(psutil.Process(int(os.environ[DRIVER_PID])))
    threading.Thread(target=_watch, args=(watched,), daemon=True, name="orphan-watch").start()


def _watch(watched: list[psutil.Process]) -> None:
    # is_running compares the start time too, so a reused process id is not mistaken for the old process.
    while all(process.is_running() for process in watched):
        time.sleep(_POLL_S)
    os._exit(1)
