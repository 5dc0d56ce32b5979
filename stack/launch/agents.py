"""The driver's hold on the agents of a run, one on each host: their orders, the lifelines, their reports."""

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil

from stack.errors import HostError
from stack.launch.agent import BEAT_S, LOOK, SAVE, STOP
from stack.launch.hosts import Host, module_on
from stack.launch.order import Order
from stack.launch.processes import end_session
from stack.launch.verdict import Ended, Failure, Report
from stack.train.progress import Look
from stack.train.rundir import RunDir

#: Six beats. The driver may be slow; a host that is cut off must not train for ever.
SILENCE_S = 30.0
#: Longest silence of an agent: before its first word, when it imports what it needs, and after it.
_START_S, _SILENT_S = 180.0, 60.0
#: Most that counts as silence between two looks: of a driver that was suspended, what was said meanwhile is yet unread.
_LOOK_S = 1.0
#: What an agent has for ending once it has closed its output.
_LAST_S = 5.0
#: Lines of the launchers' own logging; skipped when looking for the reason of a failure.
_CHATTER = ("[launch.py:", " torch/distributed/", "=====", "-----")


class Agent:
    """One host's agent, from its start to its end."""

    def __init__(self, host: Host, order: Order, log: Path):
        """Starts it; what it and its launcher print goes to `log`."""
        self.host, self._order, self._log = host, order, log
        self.report: Report | None = None
        """None as long as its ranks are at work, and for ever where the agent was lost."""
        self.looks: list[Look] | None = None
        """Its answer to `look`."""
        self._fault = ""
        self._spoke = self._is_silent = False
        self._heard, self._silence_s = threading.Event(), 0.0
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as file:
            # A session of its own: Ctrl-C reaches the driver alone, which then stops the ranks in good order.
            self._process = subprocess.Popen(
                module_on(host, "stack.launch.agent"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )
        self._told, self._speaking = threading.Event(), threading.Lock()
        self._say(json.dumps(asdict(order)).encode() + b"\n")
        self._listener = threading.Thread(target=self._listen, name=f"agent-{host.name}", daemon=True)
        self._listener.start()
        threading.Thread(target=self._beat, name=f"beat-{host.name}", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether it has nothing more to tell."""
        return not self._listener.is_alive()

    def lost(self) -> Failure:
        """Why the agent ended without a report. Returns at once."""
        code = self._process.poll()
        if self._fault:
            return self._failure(f"what its agent said cannot be read ({self._fault}): a fault of stack")
        if code is None:
            return self._failure("its agent has closed its output and does not end: a fault of stack")
        words = last_line(self._log)
        what = "could not be reached, or was lost" if code == 255 and not self.host.here else f"lost its agent ({code})"
        return self._failure(f"{what}: {words}", separator=" ")

    def silent(self, passed_s: float) -> Failure | None:
        """Whether nothing was heard of the agent for too long: it or its host is stopped, and would not tell of a rank
        that fails.

        Args:
            passed_s: seconds since this was asked last.
        """
        if self._heard.is_set():
            self._heard.clear()
            self._spoke, self._silence_s = True, 0.0
        self._silence_s += min(passed_s, _LOOK_S)
        limit = _SILENT_S if self._spoke else _START_S
        if self.report or self.ended or self._silence_s <= limit:
            return None
        self._is_silent = True
        pid = self._process.pid
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.host.here and psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                return self._failure(f"its agent (process {pid}) was stopped by SIGSTOP; no run goes on without it")
        return self._failure(f"no word from its agent for {limit:g} s; the host hangs, or the agent is stopped there")

    def _failure(self, what: str, separator: str = ": ") -> Failure:
        message = f"{self.host.name}{separator}{what}"
        return Failure("HostError", message, HostError.exit_code, rank=None, host=self.host.name)

    def save(self) -> None:
        """Asks the ranks to save and end; returns at once."""
        self._say(SAVE)

    def look(self) -> None:
        """Asks how its ranks stand, where ranks hang; returns at once."""
        self._say(LOOK)

    def stop(self) -> None:
        """Asks for the end of the ranks; returns at once."""
        if not self._told.is_set():
            self._told.set()
            self._say(STOP, last=True)

    def wait(self) -> None:
        """Returns when nothing of the run is left on the host, or nothing more can be done about it from here."""
        # One that is stopped can end nothing in good order.
        grace_s = 0.0 if self._is_silent else self._order.grace_s
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self._is_silent else 3 * grace_s + BEAT_S)
        # Of an agent that hangs or was killed, here; of ssh, which is then without its other end.
        end_session(self._process.pid, grace_s=grace_s)
        self._process.wait()

    def _say(self, line: bytes, *, last: bool = False) -> None:
        line_to_agent = self._process.stdin
        assert line_to_agent
        # Of an agent that is gone the listener learns.
        with self._speaking, contextlib.suppress(BrokenPipeError):
            if not line_to_agent.closed:
                line_to_agent.write(line)
                line_to_agent.flush()
                if last:
                    line_to_agent.close()

    def _beat(self) -> None:
        while not self._told.wait(BEAT_S):
            self._say(b"\n")

    def _listen(self) -> None:
        assert self._process.stdout
        try:
            for line in self._process.stdout:
                self._heard.set()
                self._take(line)
        except Exception as error:  # noqa: BLE001 - whatever it is, the driver must not wait for this agent any more
            self._fault = f"{type(error).__name__}: {error}"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_S)

    def _take(self, line: bytes) -> None:
        """Takes in one line. What a login shell prints comes the same way, and is no object of ours."""
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(said, dict):
            return
        if "looks" in said:
            self.looks = [Look(**seen) for seen in said["looks"]]
        elif "report" in said:
            fields = said["report"]
            ranks, looks = [Ended(**rank) for rank in fields["ranks"]], [Look(**seen) for seen in fields["looks"]]
            self.report = Report(**{**fields, "ranks": ranks, "looks": looks})


@contextlib.contextmanager
def agents(orders: Sequence[tuple[Host, Order]], run: RunDir) -> Iterator[list[Agent]]:
    """Starts the agents of a run; at the end, however it comes, no process of the run is left."""
    started: list[Agent] = []
    try:
        for host, order in orders:
            started.append(Agent(host, order, run.launcher_log(host.name)))
        yield started
    finally:
        for agent in started:
            agent.stop()
        for agent in started:
            agent.wait()


def last_line(log: Path) -> str:
    """What was printed last, the launchers' own account of what they start and stop left out."""
    # With its run directory the log may be gone.
    text = log.read_text(errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines()]
    told = [line for line in lines if line and not any(words in line for words in _CHATTER)]
    return told[-1] if told else "it printed no error"
