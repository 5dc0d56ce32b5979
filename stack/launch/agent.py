"""`python -m stack.launch.agent`: on each host of a run, starts the ranks, watches them, and ends with the driver.

The driver writes to the agent's standard input, directly or through ssh. The first line is an `Order`. Then the driver
sends an empty line every few seconds, `save` when the ranks must save and end, `stop` when they must end at once, and
`look` when ranks hang and the driver asks which. If the input ends without a `stop`, or nothing arrives for too long,
the driver or the connection is gone, and the agent ends the ranks.

The agent's standard output has one JSON object on each line: `{"report": ...}` when the first rank failed or the last
one ended, and `{"looks": ...}` in answer to `look`. An empty line every few seconds says that the agent is alive.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from io import RawIOBase
from pathlib import Path

from stack.errors import HangError, RankFailure
from stack.launch.environment import environment_of
from stack.launch.order import Command, Order
from stack.launch.processes import end_session, signal_ranks
from stack.launch.verdict import Report, first_failure
from stack.launch.watch import Watch
from stack.train import rundir
from stack.train.rundir import RunDir

SAVE, STOP, LOOK = b"save\n", b"stop\n", b"look\n"
#: Seconds between two empty lines, of the driver and of the agent.
BEAT_S = 5.0
_POLL_S = 0.2
#: After the first sign of a failure, seconds to wait for the rank that caused it to report its error.
_SETTLE_S = 2.0
#: After the first rank gave up waiting, seconds for the other waiting ranks to do so too. The rank that hangs does not.
_HANG_S = 3.0


class Lifeline:
    """Reads what the driver writes to the standard input."""

    def __init__(self, line: RawIOBase, silence_s: float | None):
        self._line, self._silence_s, self._heard = line, silence_s, time.monotonic()
        self.lost = False
        """The driver, or the connection to it, is gone."""
        self.save = False
        """The driver has asked for a save, after which the ranks end."""
        self.look = False
        """The driver has asked for the states of the ranks."""

    def holds(self, within_s: float) -> bool:
        """Waits up to `within_s` seconds for input. Returns False if the ranks must end: `stop` came, or the
        driver is gone."""
        if select.select([self._line], [], [], within_s)[0]:
            heard = self._line.read(4096) or b""
            self._heard = time.monotonic()
            self.lost = not heard
            self.save = self.save or SAVE in heard
            self.look = self.look or LOOK in heard
            return bool(heard) and STOP not in heard
        self.lost = self._silence_s is not None and time.monotonic() - self._heard > self._silence_s
        return not self.lost


class Voice:
    """Writes to the agent's standard output. Two threads use it, and a lock keeps their lines whole."""

    def __init__(self, descriptor: int):
        self._descriptor, self._speaking = descriptor, threading.Lock()

    def say(self, what: Mapping[str, object] | None = None) -> None:
        """Writes one JSON object, or an empty line. Ignores that the driver is gone."""
        line = (json.dumps(what) if what else "").encode() + b"\n"
        with self._speaking, contextlib.suppress(OSError):
            while line:
                line = line[os.write(self._descriptor, line) :]

    def beat(self) -> None:
        """Starts a thread that writes an empty line every few seconds. The thread reads no files, so that a file server
        that does not answer for a while does not make the agent look dead."""

        def go_on() -> None:
            while True:
                self.say()
                time.sleep(BEAT_S)

        threading.Thread(target=go_on, daemon=True, name="beat").start()


def main() -> int:
    """Carries out one order. Returns 0 however the ranks ended."""
    voice = Voice(sys.stdout.fileno())
    voice.beat()
    with open(0, "rb", buffering=0) as line:
        raw = json.loads(line.readline())
        order = Order(**{**raw, "commands": [Command(**command) for command in raw["commands"]]})
        run, lifeline = RunDir(Path(order.run)), Lifeline(line, order.silence_s)
        watch: Watch | None = None
        try:
            launchers = _start(order)
            watch = Watch(run, order, launchers)
            report = _wait(watch, lifeline, voice)
            if report:
                voice.say({"report": asdict(report)})
            if lifeline.lost and 0 in order.ranks:
                _record_lost_driver(run)
        finally:
            # SIGINT, because on SIGTERM a rank that trains would save first.
            signal_ranks(watch.known.values() if watch else (), signal.SIGINT)
            # The agent was started as the leader of a session, so all processes that come from it are in that session.
            end_session(os.getsid(0), grace_s=order.grace_s)
    return 0


def _start(order: Order) -> list[subprocess.Popen]:
    environment = environment_of(os.environ, order.environment, len(order.ranks))
    # The output of the launchers goes to the agent's standard error, which the driver writes to the launcher's log.
    return [
        subprocess.Popen(
            command.argv,
            env={**environment, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
        )
        for command in order.commands
    ]


def _wait(watch: Watch, lifeline: Lifeline, voice: Voice) -> Report | None:
    """Waits for the first failure, or for the end of all ranks. None if the lifeline says first that they must end."""
    since: float | None = None
    while lifeline.holds(_POLL_S):
        if lifeline.save:
            watch.ask_to_save()
        if lifeline.look:
            lifeline.look = False
            voice.say({"looks": [asdict(seen) for seen in watch.look()]})
        report = watch.report()
        if report.well:
            return report
        if report.launcher is not None or any(rank.outcome != "done" for rank in report.ranks):
            since = since or time.monotonic()
            failure, sure = first_failure([report])
            hangs = failure is not None and failure.exit_code == HangError.exit_code
            if time.monotonic() - since >= (_HANG_S if hangs else 0 if sure else _SETTLE_S):
                return Report(report.host, report.started, report.ranks, report.launcher, watch.look() if hangs else [])
    return None


def _record_lost_driver(run: RunDir) -> None:
    """Writes FAILED.json in place of the driver, which is gone."""
    if not run.done.exists() and not run.failed.exists():
        error = {
            "type": "RankFailure",
            "message": "the driver is gone, or the connection to it was lost; the ranks of the run end too",
            "exit_code": RankFailure.exit_code,
        }
        rundir.write_last(run.failed, {**error, "time": time.time()})


if __name__ == "__main__":
    sys.exit(main())
