"""Exclusive use of a run directory: `lock.json` names the process that works there."""

import atexit
import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from stack.errors import UsageError
from stack.health.orphan import is_alive

LOCK = "lock.json"
#: What takers hold for a moment. Never removed: a process that waits on a removed file would hold what nobody sees.
_GUARD = ".lock"
#: Seconds by which two readings of one process's start may differ: the kernel's boot time is read in whole seconds.
_SAME_START_S = 2.0


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
        return cls(socket.gethostname(), _place(), os.getpid(), _started(psutil.Process()), time.time())

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

    Whoever ends in another way leaves a stale lock, which the next one takes over: at once where it can see that the
    process is gone, else when the lock has not been renewed for `stale_s` seconds.
    """

    def __init__(self, run: Path, *, holder: Holder | None = None, renew_s: float = 10.0, stale_s: float = 60.0):
        """
        Args:
            run: an existing run directory.
            holder: who takes it, if not this process.
            renew_s: seconds between two signs of life.
        """
        self._run, self._path = run, run / LOCK
        self._holder, self._renew_s, self._stale_s = holder or Holder.me(), renew_s, stale_s
        self._content = (json.dumps(asdict(self._holder), indent=2) + "\n").encode()
        self._released = threading.Event()

    def acquire(self) -> None:
        """Takes the run directory.

        Raises:
            UsageError: another process is at work in it, or it cannot be written.
        """
        try:
            with self._guarded(), self._written() as mine:
                while not _link(mine, self._path):
                    self._put_away_if_stale(mine)
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

    def _put_away_if_stale(self, mine: Path) -> None:
        """Clears the way for the next try.

        Raises:
            UsageError: the lock is held.
        """
        try:
            # Content and time of one file: the name may become another's meanwhile.
            with self._path.open("rb") as file:
                content, renewed = file.read(), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return
        # The file server's clock for both, whatever the hosts' clocks say.
        os.utime(mine)
        age_s = mine.stat().st_mtime - renewed
        holder = _parse(content)
        near = holder is not None and holder.place == self._holder.place
        if not (holder.is_gone if holder and near else age_s > self._stale_s):
            if holder is None:
                raise UsageError(f"{self._path} is damaged, and may be that of a process at work; wait a minute")
            who = f"process {holder.pid} on host {holder.host} since {_time(holder.since)}"
            raise UsageError(f"{self._run} is in use by {who}; wait for it, or start another run")
        # Renamed before it is removed: only one taker gets it.
        aside = mine.with_name(f"{mine.name}.stale")
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)
            if aside.read_bytes() != content:
                # It was a faster taker's, by now.
                _link(aside, self._path)
            aside.unlink()

    def _renew(self) -> None:
        while not self._released.wait(self._renew_s):
            # A file server that does not answer now may do so next time.
            with contextlib.suppress(OSError):
                if self._is_ours():
                    os.utime(self._path)

    def _is_ours(self) -> bool:
        # A forked child has this object too.
        return os.getpid() == self._holder.pid and self._path.read_bytes() == self._content


def _link(source: Path, target: Path) -> bool:
    """Gives the content of `source` the name `target`, at once; False where something has that name."""
    try:
        os.link(source, target)
    except FileExistsError:
        # A file server's answer may get lost, and the call be made a second time.
        return source.stat().st_nlink > 1
    except OSError:
        # Not every file system has links. Half a lock is then seen for a moment, and is as good as a fresh one.
        try:
            with target.open("xb") as file:
                file.write(source.read_bytes())
        except FileExistsError:
            return False
    return True


def _parse(content: bytes) -> Holder | None:
    try:
        about: dict[str, Any] = json.loads(content)
        return Holder(**about)
    except (ValueError, TypeError):
        return None


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _started(process: psutil.Process) -> float:
    # First the boot time, which some versions of psutil remember from then on.
    booted = psutil.boot_time()
    return process.create_time() - booted


def _place() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
