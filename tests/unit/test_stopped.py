"""A rank that gets SIGTERM before it trains reports that and ends, even inside a call that never returns. A rank that
trains is only asked to end."""

import ctypes
import os
import signal
import time
from collections.abc import Callable

import pytest

from stack.health.stopped import Stop


def ended_with(work: Callable[[Callable[[], int]], int], *numbers: signal.Signals) -> int:
    """Calls `work(ready)` in a new process, sends it the signals after it has called `ready`, and returns its exit
    code."""
    ready, readying = os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            code = work(lambda: os.write(readying, b"."))
        finally:
            os._exit(code)
    os.read(ready, 1)
    for number in numbers:
        os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def test_a_process_stopped_inside_a_library_tells_it(tmp_path):
    def work(ready):
        Stop((tmp_path / "told").touch, leave=(tmp_path / "left").touch)
        ready()
        libc, locked = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(locked)
        # A second lock of the same mutex blocks for ever and, unlike a read or a sleep, no signal interrupts it.
        return libc.pthread_mutex_lock(locked)

    assert ended_with(work, signal.SIGWINCH, signal.SIGTERM) == 143
    assert (tmp_path / "told").exists()
    assert (tmp_path / "left").exists()


def test_a_process_ends_though_it_cannot_tell(tmp_path):
    def work(ready):
        Stop((tmp_path / "no such folder" / "told").touch)
        ready()
        time.sleep(600)

    assert ended_with(work, signal.SIGTERM) == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_process_that_trains_is_only_asked(tmp_path, number):
    def work(ready):
        stop = Stop((tmp_path / "told").touch, leave=(tmp_path / "left").touch)
        stop.wait_for_step()
        assert not stop.asked()
        ready()
        while not stop.asked():
            time.sleep(0.01)
        return 75

    assert ended_with(work, number) == 75
    assert (tmp_path / "told").exists()
    assert not (tmp_path / "left").exists()


def test_ctrl_c_ends_a_process_that_trains():
    def work(ready):
        Stop(lambda: None).wait_for_step()
        ready()
        # Each signal interrupts a pause, so a process that is only asked to end would go on.
        while True:
            signal.pause()

    assert ended_with(work, signal.SIGTERM, signal.SIGINT) == 130
