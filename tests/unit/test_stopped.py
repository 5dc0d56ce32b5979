"""A rank that is stopped says so, even in the middle of a call that never returns."""

import ctypes
import os
import signal
import time

import pytest

from stack.health.stopped import Stop


def test_a_process_stopped_inside_a_library_tells_it(tmp_path):
    ready, readying = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            Stop((tmp_path / "told").touch)
            os.write(readying, b".")
            libc, locked = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            libc.pthread_mutex_lock(locked)
            # Unlike a read or a sleep this is not interrupted by a signal.
            libc.pthread_mutex_lock(locked)
        finally:
            os._exit(1)
    os.read(ready, 1)
    os.kill(pid, signal.SIGWINCH)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 143
    assert (tmp_path / "told").exists()


def test_a_process_ends_though_it_cannot_tell(tmp_path):
    ready, readying = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            Stop((tmp_path / "no such folder" / "told").touch)
            os.write(readying, b".")
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.read(ready, 1)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_process_that_trains_is_only_asked(tmp_path, number):
    ready, readying = os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            stop = Stop((tmp_path / "told").touch)
            stop.wait_for_step()
            assert not stop.asked()
            os.write(readying, b".")
            while not stop.asked():
                time.sleep(0.01)
            code = 75
        finally:
            os._exit(code)
    os.read(ready, 1)
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    assert (tmp_path / "told").exists()


def test_ctrl_c_ends_a_process_that_trains():
    ready, readying = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            Stop(lambda: None).wait_for_step()
            os.write(readying, b".")
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.read(ready, 1)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
