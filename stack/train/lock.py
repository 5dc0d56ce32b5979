"""The lock of a run directory: `lock.json` names the process that works there, and other processes are refused."""

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
#: File with a kernel lock (`flock`), which a process holds briefly while it takes or releases `lock.json`. The file is
#: never removed: a process that waits for the lock of a removed file would get a lock that no other process sees.
_GUARD = ".lock"
#: Two readings of a process's start may differ by so many seconds, because the boot time is read in whole seconds.
_SAME_START_S = 2.0
#: Seconds between two looks at the lock of a process on another host.
_POLL_S = 1.0


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, described so that other processes can find it."""

    host: str
    place: str
    """Identifies the process table (boot id and pid namespace) to which `pid` belongs. A host name is not enough,
    because two containers may share one."""
    pid: int
    started: float
    """Seconds from the boot of the kernel to the start of the process; unaffected by changes of the time of day."""
    since: float
    """When the process took the lock, in Unix seconds."""

    @classmethod
    def me(cls) -> Self:
        """This process, now."""
        return cls(socket.gethostname(), disk.place(), os.getpid(), _started(psutil.Process()), time.time())

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended, even if another process has its id now. Only for processes of the same
        `place` as the caller."""
        try:
            process = psutil.Process(self.pid)
            return not is_alive(process) or abs(_started(process) - self.started) > _SAME_START_S
        except psutil.NoSuchProcess:
            return True


class RunLock:
    """The lock of a run directory. Use it as a context manager, or call `acquire` and `release`; a normal exit of the
    process releases it too.

    A holder that is killed leaves a stale lock, which the next process takes over: at once on the same host, where the
    process table shows that the holder has ended. The process table of another host cannot be read. There the next
    process waits for up to `stale_s` seconds. A holder that renews the lock in this time is alive, and the next process
    is refused; otherwise it takes the lock over.
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
            holder: the process that takes the lock; None for this process.
            renew_s: seconds between two renewals of the lock.
            stale_s: seconds without a renewal after which the lock of a process on another host is stale.
            tell: called once with a line for the user if `acquire` waits.
        """
        self._run, self._path = run, run / LOCK
        self._holder, self._renew_s, self._stale_s = holder or Holder.me(), renew_s, stale_s
        self._tell = tell
        self._content = (json.dumps(asdict(self._holder), indent=2) + "\n").encode()
        self._released = threading.Event()

    def acquire(self) -> None:
        """Takes the lock. Waits, at most `stale_s`, if the lock belongs to a process of another host.

        Raises:
            UsageError: another process works in the run directory, or the directory cannot be written.
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
                        f"{self._stale_s - found.age_s:.0f} s for it to renew its lock, then continuing"
                    )
                # The guard is free while this process sleeps, because the holder needs it to release the lock.
                time.sleep(min(_POLL_S, self._stale_s / 10))
        except OSError as error:
            raise UsageError(
                f"{self._run} cannot be locked ({error.strerror or error}); use a run directory that you can write to"
            ) from error
        self._released.clear()
        atexit.register(self.release)
        threading.Thread(target=self._renew, daemon=True, name="run-lock").start()

    def release(self) -> None:
        """Releases the lock. Does nothing if another process has taken it over, or in a forked child of the holder."""
        self._released.set()
        atexit.unregister(self.release)
        # If the directory can no longer be written, the lock stays and becomes stale.
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
        """Holds the guard inside a `with` block, because taking a lock over needs several system calls. The kernel
        releases the guard when its holder dies."""
        with (self._run / _GUARD).open("a") as file:
            # Some file systems have no flock. There the order of the calls keeps two processes from taking the lock
            # both, but not three.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _written(self) -> Iterator[Path]:
        """A temporary file with the content of our lock, which is complete before it is linked to lock.json."""
        path = self._path.with_name(f".{LOCK}.{secrets.token_hex(4)}")
        try:
            path.write_bytes(self._content)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _try(self) -> "_Found | None":
        """Takes the lock and returns None, or returns the existing lock that prevents it."""
        with self._guarded(), self._written() as mine:
            while not disk.link_new(mine, self._path):
                if found := self._put_away_if_stale(mine):
                    return found
        return None

    def _put_away_if_stale(self, mine: Path) -> "_Found | None":
        """Removes a stale lock and returns None, or returns the lock if its holder may be alive.

        Args:
            mine: the file of `_written`.
        """
        try:
            # The time is read before the content. If the holder renews the lock in between, it only looks older.
            renewed = self._path.stat().st_mtime
            content = disk.read_regular(self._path)
        except FileNotFoundError:
            return None
        # Both times come from the clock of the file server, because the clocks of the hosts may differ.
        os.utime(mine)
        age_s = abs(mine.stat().st_mtime - renewed)
        holder = _parse(content)
        near = holder is not None and holder.place == self._holder.place
        if not (holder.is_gone if holder and near else age_s > self._stale_s):
            return _Found(holder, renewed, age_s, alive=near)
        # The stale lock is renamed before it is removed; of several processes only one can rename it.
        aside = mine.with_name(f"{mine.name}.stale")
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)
            if aside.read_bytes() != content:
                # Another process was faster, and this is its new lock: put it back.
                disk.link_new(aside, self._path)
            aside.unlink()
        return None

    def _renew(self) -> None:
        while not self._released.wait(self._renew_s):
            # A failed renewal is tried again next time, since the file server may only be slow.
            with contextlib.suppress(OSError):
                if self._is_ours():
                    os.utime(self._path)

    def _is_ours(self) -> bool:
        # The process id is compared because a forked child has this object too, but not the lock.
        return os.getpid() == self._holder.pid and self._path.read_bytes() == self._content


@dataclass(frozen=True)
class _Found:
    """The existing lock of another process. Two of these are equal if the lock was not renewed in between."""

    holder: Holder | None
    """None where the file is damaged."""
    renewed: float
    """Time of the last renewal by the clock of the file system, in Unix seconds."""
    age_s: float = field(compare=False)
    """Seconds since the last renewal."""
    alive: bool
    """Whether the process table shows that the holder is alive."""

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
    # The boot time is read first, because some versions of psutil cache it for `create_time`.
    booted = psutil.boot_time()
    return process.create_time() - booted
