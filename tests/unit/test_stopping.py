"""`stack stop`, and how a run reacts to requests to end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from stack.errors import StackError, UsageError
from stack.launch import stopping
from stack.launch.signals import Requests
from stack.launch.standing import standing
from stack.launch.stopping import stop
from stack.train import bare, rundir, stop_request
from stack.train.lock import LOCK, Holder, RunLock
from stack.train.rundir import RunDir
from stack.train.stop_request import StopRequests


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path)


@pytest.fixture
def at_work(run):
    with RunLock(run.path):
        yield run


def state(run: RunDir) -> str:
    return standing(run, Holder.me()).state


def ends(run: RunDir, verdict: dict | None) -> threading.Thread:
    """A thread in the place of a run: it ends when it is asked to, and writes the file of `verdict` if there is one."""

    def end() -> None:
        while not (run.path / "stop.json").exists():
            time.sleep(0.01)
        if verdict:
            rundir.write_json(run.ended_early(verdict["exit_code"]), verdict)
        else:
            rundir.write_json(run.done, {})

    thread = threading.Thread(target=end)
    thread.start()
    return thread


def test_a_run_that_is_not_at_work_is_told_so(run):
    with pytest.raises(UsageError, match="is not running: ended: it wrote no result"):
        stop(run, now=False, timeout_s=1)
    rundir.write_json(run.done, {"step": 5})
    with pytest.raises(UsageError, match=r"is not running: done$"):
        stop(run, now=False, timeout_s=1)
    assert not (run.path / "stop.json").exists()


SAVED = {"type": "Requeue", "message": "saved on request after step 3 of 9", "exit_code": 75}
FAILED = {"type": "HostError", "message": "the disk is gone\nmore", "exit_code": 9, "rank": 1}


@pytest.mark.parametrize(
    ("verdict", "code", "told"),
    [
        (SAVED, 0, "saved: saved on request after step 3 of 9\n"),
        (FAILED, 9, "failed: HostError: rank 1: the disk is gone\nto go on: stack resume"),
        (None, 0, "done\n"),
    ],
)
def test_how_the_run_ended_is_told(at_work, verdict, code, told, capsys):
    ending = ends(at_work, verdict)
    assert stop(at_work, now=False, timeout_s=10) == code
    ending.join()
    out = capsys.readouterr().out
    assert out.startswith(f"asked the run to save and end (process {os.getpid()} on ")
    assert told in out


def test_a_run_that_does_not_end_in_time(at_work):
    with pytest.raises(StackError, match=r"still running after 0\.1 s .*stack stop .* --now"):
        stop(at_work, now=False, timeout_s=0.1)
    assert StopRequests(at_work).poll() == "save"
    with pytest.raises(StackError, match="kill that process"):
        stop(at_work, now=True, timeout_s=0.1)
    assert StopRequests(at_work).poll() == "now"


def test_a_run_of_another_host_is_at_work_as_long_as_its_lock_is_renewed(run, monkeypatch):
    elsewhere = Holder("node-7", "another kernel", 1, 0.0, 0.0)
    with RunLock(run.path, holder=elsewhere):
        assert str(standing(run, Holder.me())) == "running: process 1 on node-7"
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 61)
        assert state(run) == "ended"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"host": 1}', "[" * 100_000, '{"pid": "x"}', "\x00"])
def test_a_damaged_lock_or_verdict_is_no_traceback(run, content):
    (run.path / LOCK).write_text(content)
    assert state(run) == "ended"
    run.failed.write_text(content)
    assert str(standing(run, Holder.me())) == "failed: FAILED.json is damaged"


def test_a_pipe_in_the_place_of_a_lock_or_verdict_is_not_waited_for(run):
    os.mkfifo(run.path / LOCK)
    assert state(run) == "ended"
    os.mkfifo(run.failed)
    assert str(standing(run, Holder.me())) == "failed: FAILED.json is damaged"


def test_what_a_file_says_cannot_steer_a_terminal(run):
    rundir.write_json(run.failed, {"type": "X", "message": "\x1b[2Jboo\nmore", "exit_code": 9})
    assert str(standing(run, Holder.me())) == "failed: X: ?[2Jboo"


def test_a_disk_is_looked_at_once_a_second(run, monkeypatch):
    requests = StopRequests(run)
    assert requests.poll() is None
    stop_request.ask(run, now=False)
    assert requests.poll() is None
    later = time.monotonic() + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert requests.poll() == "save"
    stop_request.clear(run)
    assert requests.poll() == "save"
    (run.path / "stop.json").write_text("nonsense")
    assert StopRequests(run).poll() is None


def test_requests_come_in_their_order_and_once(run):
    signals: list[signal.Signals] = []
    requests = Requests(signals, run)
    requests._stop = StopRequests(run, every_s=0)
    assert requests.poll() == []
    stop_request.ask(run, now=False)
    requests.poll()
    signals.append(signal.SIGINT)
    requests.poll()
    stop_request.ask(run, now=True)
    signals.append(signal.SIGHUP)
    found = [(request.by, request.saves, request.exit_code) for request in requests.poll()]
    assert found[:2] == [("stack stop", True, 143), ("Ctrl-C", True, 130)]
    assert sorted(found[2:]) == [("SIGHUP", False, 129), ("stack stop", False, 143)]


def test_rank_0_hears_it_without_a_driver(run, monkeypatch):
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(bare.os, "kill", lambda *about: killed.append(about))
    monkeypatch.setattr(bare.time, "sleep", lambda _: None)
    heard = bare.hears_stop(run, lambda: False, saves=True)
    assert not heard()
    stop_request.ask(run, now=False)
    assert bare.hears_stop(run, lambda: False, saves=True)()
    assert not (run.path / "stop.json").exists()
    assert bare.hears_stop(run, lambda: True, saves=True)()
    assert not killed
    for now, saves in ((True, True), (False, False)):
        stop_request.ask(run, now=now)
        bare.hears_stop(run, lambda: False, saves=saves)()
    assert killed == [(os.getpid(), signal.SIGINT)] * 2
    assert json.loads(run.failed.read_text())["message"] == "stopped by stack stop"


def test_the_verb_refuses_what_it_does_not_know(tmp_path):
    from stack.cli.verbs import VERBS

    (tmp_path / "config.yaml").touch()
    for word in ("--later", "--timeout=", "--timeout=-1", "--timeout=0", "train.steps=3"):
        with pytest.raises(UsageError, match="stack stop knows --now and --timeout=SECONDS"):
            VERBS["stop"].run([str(tmp_path), word])


def test_polling_is_quick():
    assert stopping._POLL_S <= 0.5


_ENDS = """
import os, signal, sys
from stack.cli import main

class AtExit:
    # Python frees its modules after it has restored the default actions of signals. The names of this script are gone
    # by then, so that the method keeps what it needs as defaults.
    def __del__(self, kill=os.kill, write=os.write, pid=os.getpid(), number=signal.{signal}):
        kill(pid, number)
        write(1, b"still here")

sys.at_exit = AtExit()
main.main = lambda: 75
sys.exit(main.command())
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_request_to_end_that_comes_while_the_command_exits_does_not_replace_the_exit_code(number):
    ended = subprocess.run(
        [sys.executable, "-c", _ENDS.format(signal=number)], check=False, capture_output=True, text=True
    )

    assert (ended.returncode, ended.stdout, ended.stderr) == (75, "still here", "")
