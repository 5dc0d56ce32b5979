"""Only one process works in a run directory, and the lock of a process that has ended is taken over."""

import concurrent.futures
import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stack.errors import UsageError
from stack.train.lock import LOCK, Holder, RunLock

ME = Holder.me()
ELSEWHERE = dataclasses.replace(ME, host="node7", place="another kernel", pid=4711, since=0.0)

#: A program that reads folders from its input, takes the lock of each when `<folder>.go` appears, and prints whether it
#: got the lock.
_TAKER = """
import errno, fcntl, os, sys
from pathlib import Path
from stack.errors import UsageError
from stack.train.lock import RunLock

def no_flock(*_):
    raise OSError(errno.ENOSYS, "no flock here")

if sys.argv[1] == "no flock":
    fcntl.flock = no_flock
for line in sys.stdin:
    run = Path(line.strip())
    print("ready", flush=True)
    while not run.with_suffix(".go").exists():
        pass
    try:
        RunLock(run).acquire()
        print("got it", flush=True)
    except UsageError as error:
        print(error, flush=True)
# As a rank that failed.
os._exit(0)
"""


class Taker:
    """Another process that takes locks."""

    def __init__(self, flock: str = "flock"):
        command = [sys.executable, "-c", _TAKER, flock]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def ready(self, run: Path) -> None:
        self.process.stdin.write(f"{run}\n")
        assert self.line() == "ready"

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def take(self, run: Path) -> str:
        self.ready(run)
        run.with_suffix(".go").touch()
        return self.line()


@pytest.fixture
def taker():
    """`taker()` starts a `Taker`."""
    started: list[Taker] = []

    def start(*arguments: str) -> Taker:
        started.append(Taker(*arguments))
        return started[-1]

    yield start
    for other in started:
        other.process.kill()
        other.process.communicate()


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def left_by(holder: Holder, run: Path, *, age_s: float = 0.0) -> Path:
    """Makes the lock of a holder that does not renew it; `age_s` is the time since its last renewal."""
    lock = RunLock(run, holder=holder, renew_s=1e6)
    lock.acquire()
    then = time.time() - age_s
    os.utime(run / LOCK, (then, then))
    return run / LOCK


def assert_only_the_guard_is_left(run: Path) -> None:
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_a_second_process_is_refused_in_one_line(run, taker):
    with RunLock(run):
        since = time.strftime("%Y-%m-%d %H:", time.localtime())
        told = taker().take(run)
        assert told.startswith(f"{run} is in use by process {os.getpid()} on host {ME.host} since {since}")
        assert told.endswith("; wait for it, or start another run")
    assert_only_the_guard_is_left(run)
    with RunLock(run):
        pass


def test_the_same_process_is_refused_too(run):
    with RunLock(run), pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        RunLock(run).acquire()
    assert_only_the_guard_is_left(run)


def test_a_killed_holder_leaves_a_lock_that_is_taken_at_once(run, taker):
    holder = taker()
    assert holder.take(run) == "got it"
    with pytest.raises(UsageError, match=f"in use by process {holder.process.pid}"):
        RunLock(run).acquire()
    holder.process.send_signal(signal.SIGSTOP)
    with pytest.raises(UsageError):
        RunLock(run).acquire()
    holder.process.kill()
    # A zombie, whose parent has not read its exit code, counts as ended.
    while Path(f"/proc/{holder.process.pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z":
        time.sleep(0.01)
    with RunLock(run):
        assert f'"pid": {os.getpid()}' in (run / LOCK).read_text()
    assert_only_the_guard_is_left(run)


def test_a_process_id_that_was_given_away_again_is_no_holder(run):
    left_by(dataclasses.replace(ME, started=ME.started - 100, since=0.0), run)
    with RunLock(run):
        pass


@pytest.mark.parametrize("host", ["node7", ME.host])
def test_another_host_that_renews_it_holds_it(run, host):
    # The same holds for another container with our host name, since its process ids are not valid here.
    holder = RunLock(run, holder=dataclasses.replace(ELSEWHERE, host=host))
    holder.acquire()
    told: list[str] = []
    renewing = threading.Timer(0.3, lambda: os.utime(run / LOCK))
    renewing.start()
    with pytest.raises(UsageError, match=f"in use by process 4711 on host {host} since 19"):
        RunLock(run, stale_s=5, tell=told.append).acquire()
    renewing.join()
    assert '"pid": 4711' in (run / LOCK).read_text()
    [line] = told
    assert "waiting up to 5 s for it to renew its lock" in line


def test_an_attempt_that_was_killed_elsewhere_is_waited_for_and_not_refused(run):
    left_by(ELSEWHERE, run)
    told: list[str] = []
    began = time.monotonic()
    with RunLock(run, stale_s=1, tell=told.append):
        assert f'"pid": {os.getpid()}' in (run / LOCK).read_text()
    assert 1 <= time.monotonic() - began < 5
    assert len(told) == 1
    assert_only_the_guard_is_left(run)


def test_a_lock_that_is_given_back_meanwhile_is_taken_at_once(run):
    left_by(ELSEWHERE, run)
    threading.Timer(0.2, (run / LOCK).unlink).start()
    began = time.monotonic()
    with RunLock(run, stale_s=5, tell=lambda _: None):
        assert time.monotonic() - began < 4


def test_another_host_that_was_silent_for_a_minute_holds_it_no_more(run):
    left_by(ELSEWHERE, run, age_s=70)
    with RunLock(run):
        assert f'"pid": {os.getpid()}' in (run / LOCK).read_text()


def test_the_clock_of_this_host_does_not_matter(run, monkeypatch):
    left_by(ELSEWHERE, run)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    told: list[str] = []
    with RunLock(run, stale_s=0.5, tell=told.append):
        assert len(told) == 1


def crafted(**changed: object) -> str:
    return json.dumps({**dataclasses.asdict(ELSEWHERE), **changed})


@pytest.mark.parametrize(
    "content",
    [
        *("", '{"pid": 3', "[]", '{"pid": 3}', "[" * 200_000, "9" * 5000, crafted(pid="4711"), crafted(pid=1 << 70)),
        *(
            crafted(since=1e300),
            crafted(since="then"),
            crafted(host=[1]),
            crafted(started="x"),
            crafted(place=ME.place, pid=-1),
        ),
    ],
    ids=range(13),
)
def test_a_damaged_lock_counts_until_it_is_stale(run, content):
    lock = run / LOCK
    lock.write_text(content)
    told: list[str] = []
    with RunLock(run, stale_s=0.2, tell=told.append):
        pass
    assert "an unknown process (lock.json is damaged)" in told[0]
    lock.write_text(content)
    os.utime(lock, (0, 0))
    with RunLock(run):
        pass


def test_a_pipe_in_the_place_of_a_lock_is_one_line(run):
    os.mkfifo(run / LOCK)
    with pytest.raises(UsageError, match="it is no regular file"):
        RunLock(run).acquire()


def test_a_holder_renews_its_lock_and_a_loser_does_not(run):
    lock = RunLock(run, renew_s=0.02)
    lock.acquire()
    os.utime(run / LOCK, (0, 0))
    deadline = time.monotonic() + 10
    while (run / LOCK).stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (run / LOCK).unlink()
    left_by(ELSEWHERE, run, age_s=50)
    before = (run / LOCK).stat().st_mtime
    time.sleep(0.2)
    assert (run / LOCK).stat().st_mtime == before
    lock.release()
    assert '"pid": 4711' in (run / LOCK).read_text(), "it gave back what was another's"
    assert not any(thread.name == "run-lock" and not thread.daemon for thread in threading.enumerate())


def test_a_forked_child_gives_nothing_back(run):
    with RunLock(run) as lock:
        if (pid := os.fork()) == 0:
            lock.release()
            os._exit(0)
        os.waitpid(pid, 0)
        assert (run / LOCK).exists()
    assert_only_the_guard_is_left(run)


def test_an_ordinary_exit_gives_it_back(run):
    code = "import sys, pathlib, stack.train.lock as l; l.RunLock(pathlib.Path(sys.argv[1])).acquire()"
    subprocess.run([sys.executable, "-c", code, str(run)], check=True)
    assert_only_the_guard_is_left(run)


def test_a_folder_that_is_not_there_is_one_line(run):
    with pytest.raises(UsageError, match=r"cannot be locked \(No such file or directory\); use a run directory that"):
        RunLock(run / "missing").acquire()


def test_a_file_system_without_links_has_locks_too(run, monkeypatch, taker):
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    with RunLock(run):
        assert f"in use by process {os.getpid()} on" in taker().take(run)
    assert_only_the_guard_is_left(run)
    left_by(ELSEWHERE, run, age_s=70)
    with RunLock(run), pytest.raises(UsageError, match=f"in use by process {os.getpid()} on"):
        RunLock(run).acquire()


def test_takers_come_one_after_another(run):
    # The guard is held on purpose, because a real race of three processes would be too rare in a test.
    with (run / ".lock").open("a") as guard, concurrent.futures.ThreadPoolExecutor() as pool:
        fcntl.flock(guard, fcntl.LOCK_EX)
        taken = pool.submit(RunLock(run).acquire)
        with pytest.raises(concurrent.futures.TimeoutError):
            taken.result(0.2)
        assert not (run / LOCK).exists()
        fcntl.flock(guard, fcntl.LOCK_UN)
        taken.result(5)


@pytest.mark.parametrize(("takers", "flock"), [(4, "flock"), (2, "no flock")])
@pytest.mark.parametrize("stale", [False, True])
def test_of_several_that_race_one_gets_it(tmp_path, taker, takers, flock, stale):
    others = [taker(flock) for _ in range(takers)]
    for number in range(25):
        run = tmp_path / f"run-{number}"
        run.mkdir()
        if stale:
            left_by(ELSEWHERE, run, age_s=1000)
        for other in others:
            other.ready(run)
        run.with_suffix(".go").touch()
        told = [other.line() for other in others]
        assert told.count("got it") == 1, told
        winner = others[told.index("got it")].process.pid
        assert f'"pid": {winner}' in (run / LOCK).read_text()
        assert all(f"in use by process {winner} on" in line for line in told if line != "got it"), told
        assert sorted(path.name for path in run.iterdir()) == [".lock", LOCK]
