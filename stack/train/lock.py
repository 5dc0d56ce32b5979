"""Exclusive use of a run directory: `lock.json` names the process that works there."""

import atexit
import contextlib
import fcntl
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import psutil

from stack import disk
from stack.config.values import show
from stack.errors import UsageError
from stack.health.orphan import is_alive

LOCK = "lock.json"
#: What takers hold for a moment. Never removed: a process that waits on a removed file would hold what nobody sees.
_GUARD = ".lock"
#: Seconds by which two readings of one process's start may differ: the kernel's boot time is read in whole seconds.
_SAME_START_S = 2.0
#: Seconds between two looks at a lock whose holder cannot be seen.
_POLL_S = 1.0


@dataclass(frozen=True)
class Holder:
    """A process, as others can find it."""

    host: str
    place: str
    """The kernel and its table of processes where `pid` means something. Two containers may share a host's name."""
    pid: int
    started: float
    """Seconds from the start of the kernel to that of the process: the time of day may be set meanwhile."""
    since: float
    """Time of day at which it took the lock, seconds since 1970."""

    @classmethod
    def me(cls) -> Self:
        """This process, now."""
        return cls(socket.gethostname(), disk.place(), os.getpid(), _started(psutil.Process()), time.time())

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended, also if its id has been given to another one since. Of its own place only."""
        try:
            process = psutil.Process(self.pid)
            return not is_alive(process) or abs(_started(process) - self.started) > _SAME_START_S
        except psutil.NoSuchProcess:
            return True


class RunLock:
    """The one user of a run directory. As a context manager, or from `acquire` to `release` or an ordinary exit.

    A holder that is killed leaves a stale lock, which the next one takes over: at once where the process table shows
    that the holder has ended. The process table of another host cannot be seen. There the taker waits: a holder that
    renews the lock meanwhile is alive, and one that does not for `stale_s` seconds has ended.
    """

    def __init__(
        self,
        run: Path,
        *,
        holder: Holder | None = None,
        renew_s: float = 10.0,
        stale_s: float = 60.0,
        tell: Callable[[str], object] = print,
    ):
        """
        Args:
            run: an existing run directory.
            holder: who takes it, if not this process.
            renew_s: seconds between two signs of life.
            tell: takes a line for the user, once, where `acquire` waits.
        """
        self._run, self._path = run, run / LOCK
        self._holder, self._renew_s, self._stale_s = holder or Holder.me(), renew_s, stale_s
        self._tell = tell
        self._content = (json.dumps(asdict(self._holder), indent=2) + "\n").encode()
        self._released = threading.Event()

    def acquire(self) -> None:
        """Takes the run directory. Waits, at most `stale_s`, where it cannot be seen whether the holder has ended.

        Raises:
            UsageError: another process is at work in it, or it cannot be written.
        """
        watched: _Found | None = None
        try:
            while found := self._try():
                if found.alive or (watched and found != watched):
                    raise UsageError(f"{self._run} is in use by {found.who}; wait for it, or start another run")
                if watched is None:
                    watched = found
                    self._tell(
                        f"{self._run} was in use by {found.who}, which cannot be seen from here: waiting up to "
                        f"{self._stale_s - found.age_s:.0f} s for a sign of life, then going on"
                    )
                # Outside the guard, which a holder needs to give the lock back.
                time.sleep(min(_POLL_S, self._stale_s / 10))
        except OSError as error:
            raise UsageError(
                f"{self._run} cannot be locked ({error.strerror or error}); use a run directory that you can write to"
            ) from error
        self._released.clear()
        atexit.register(self.release)
        threading.Thread(target=self._renew, daemon=True, name="run-lock").start()

    def release(self) -> None:
        """Gives it back. Leaves a lock that meanwhile is another's, or that this process's parent took."""
        self._released.set()
        atexit.unregister(self.release)
        # Who cannot write any more leaves a stale lock.
        with contextlib.suppress(OSError), self._guarded():
            if self._is_ours():
                self._path.unlink()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Taking over is more than one call. The kernel opens the guard when its holder dies."""
        with (self._run / _GUARD).open("a") as file:
            # Some file systems have no flock. There the calls' order alone keeps two takers apart, though not three.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _written(self) -> Iterator[Path]:
        """Our lock under a name of its own, whole before anyone sees it."""
        path = self._path.with_name(f".{LOCK}.{secrets.token_hex(4)}")
        try:
            path.write_bytes(self._content)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _try(self) -> "_Found | None":
        """Takes the lock and returns None, or returns the lock that is in the way."""
        with self._guarded(), self._written() as mine:
            while not disk.link_new(mine, self._path):
                if found := self._put_away_if_stale(mine):
                    return found
        return None

    def _put_away_if_stale(self, mine: Path) -> "_Found | None":
        """Clears the way for the next try, or returns the lock that may be that of a process at work."""
        try:
            # The time first: a holder that renews the lock in between only makes it look older.
            renewed = self._path.stat().st_mtime
            content = disk.read_regular(self._path)
        except FileNotFoundError:
            return None
        # The file server's clock for both, whatever the hosts' clocks say.
        os.utime(mine)
        age_s = abs(mine.stat().st_mtime - renewed)
        holder = _parse(content)
        near = holder is not None and holder.place == self._holder.place
        if not (holder.is_gone if holder and near else age_s > self._stale_s):
            return _Found(holder, renewed, age_s, alive=near)
        # Renamed before it is removed: only one taker gets it.
        aside = mine.with_name(f"{mine.name}.stale")
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)
            if aside.read_bytes() != content:
                # It was a faster taker's, by now.
                disk.link_new(aside, self._path)
            aside.unlink()
        return None

    def _renew(self) -> None:
        while not self._released.wait(self._renew_s):
            # A file server that does not answer now may do so next time.
            with contextlib.suppress(OSError):
                if self._is_ours():
                    os.utime(self._path)

    def _is_ours(self) -> bool:
        # A forked child has this object too.
        return os.getpid() == self._holder.pid and self._path.read_bytes() == self._content


@dataclass(frozen=True)
class _Found:
    """A lock that is in the way. Two findings are equal where nobody has renewed it in between."""

    holder: Holder | None
    """None where the file is damaged."""
    renewed: float
    """Time of its last renewal by the clock of the file system, seconds since 1970."""
    age_s: float = field(compare=False)
    alive: bool
    """Whether its process can be seen, and is at work."""

    @property
    def who(self) -> str:
        if self.holder is None:
            return f"an unknown process ({LOCK} is damaged)"
        return f"process {self.holder.pid} on host {show(self.holder.host)} since {_time(self.holder.since)}"


def _parse(content: bytes) -> Holder | None:
    """The holder that a lock names; None where it is damaged."""
    try:
        holder = Holder(**disk.parse_json(content))
        _time(holder.since)
        fits = isinstance(holder.host, str) and isinstance(holder.place, str) and math.isfinite(holder.started)
        return holder if fits and type(holder.pid) is int and 0 < holder.pid < 1 << 31 else None
    except (ValueError, TypeError, OverflowError, OSError):
        return None


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _started(process: psutil.Process) -> float:
    # First the boot time, which some versions of psutil remember from then on.
    booted = psutil.boot_time()
    return process.create_time() - booted
