"""The request of `stack stop`: a file in the run directory. Any host that has the file system can ask a run to end."""

import time

from stack.train import rundir
from stack.train.rundir import RunDir

_FILE = "stop.json"


def ask(run: RunDir, *, now: bool) -> None:
    """Asks a run to end: at once with `now`, else after a save.

    Raises:
        OSError: the run directory cannot be written.
    """
    rundir.write_json(run.path / _FILE, {"now": now, "time": time.time()})


def clear(run: RunDir) -> None:
    """Removes a request: one that this attempt has read, or one that an earlier attempt did not read before it
    ended."""
    (run.path / _FILE).unlink(missing_ok=True)


class StopRequests:
    """Reads requests to end a run. Looks at the disk at most once in `every_s` seconds, however often `poll` is
    called."""

    def __init__(self, run: RunDir, *, every_s: float = 1.0):
        self._run, self._every_s, self._looked = run, every_s, -every_s
        self._asked: str | None = None

    def poll(self) -> str | None:
        """The last request, `save` or `now`; None if there was none."""
        if time.monotonic() - self._looked >= self._every_s:
            self._looked = time.monotonic()
            try:
                asked = rundir.read_json(self._run.path / _FILE)
                self._asked = self._asked if asked is None else "now" if asked["now"] else "save"
            except (OSError, ValueError, TypeError, KeyError):
                # A damaged file, or a disk that does not answer, must not end the run.
                pass
        return self._asked
