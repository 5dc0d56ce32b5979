"""`stack stop`: a file in the run directory, by which any shell on any host that sees the disk asks a run to end."""

import time

from stack.train import rundir
from stack.train.rundir import RunDir

_FILE = "stop.json"


def ask(run: RunDir, *, now: bool) -> None:
    """Asks for the end of a run: after a save, or at once.

    Raises:
        OSError: the run directory cannot be written.
    """
    rundir.write_json(run.path / _FILE, {"now": now, "time": time.time()})


def clear(run: RunDir) -> None:
    """Takes a request away: the one that an earlier attempt did not live to read, or that this one has heard."""
    (run.path / _FILE).unlink(missing_ok=True)


class StopRequests:
    """What has been asked of a run. Looks at the disk once in `every_s` seconds, however often it is asked."""

    def __init__(self, run: RunDir, *, every_s: float = 1.0):
        self._run, self._every_s, self._looked = run, every_s, -every_s
        self._asked: str | None = None

    def poll(self) -> str | None:
        """`save` or `now`, the last that was asked for; None where nothing was."""
        if time.monotonic() - self._looked >= self._every_s:
            self._looked = time.monotonic()
            try:
                asked = rundir.read_json(self._run.path / _FILE)
                self._asked = self._asked if asked is None else "now" if asked["now"] else "save"
            except (OSError, ValueError, TypeError, KeyError):
                # A file that is not ours, or a disk that does not answer: the run is not for that.
                pass
        return self._asked
