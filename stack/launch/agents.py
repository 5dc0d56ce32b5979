"""The driver's side of the agents of a run, one on each host: starts them, sends them orders, reads their reports."""

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

#: After this time without a line from the driver an agent ends its ranks, so that a host that is cut off does not train
#: for ever. Six beats, because the driver may be slow.
SILENCE_S = 30.0
#: Longest silence of an agent: before its first line, while its imports run, and after its first line.
_START_S, _SILENT_S = 180.0, 60.0
#: Most seconds that one poll adds to the silence. A driver that was suspended has not yet read the lines of that time.
_LOOK_S = 1.0
#: Seconds for an agent to end once it has closed its output.
_LAST_S = 5.0
#: Lines of the launchers' own logging; skipped when looking for the reason of a failure.
_CHATTER = ("[launch.py:", " torch/distributed/", "=====", "-----")


class Agent:
    """One host's agent, from its start to its end."""

    def __init__(self, host: Host, order: Order, log: Path):
        """Starts the agent. The output of the agent's launcher and its errors go to `log`."""
        self.host, self._order, self._log = host, order, log
        self.report: Report | None = None
        """None while the ranks of the agent work. Stays None if the agent was lost."""
        self.looks: list[Look] | None = None
        """Answer of the agent to `look`."""
        self._fault = ""
        self._spoke = self._is_silent = False
        self._heard, self._silence_s = threading.Event(), 0.0
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as file:
            # A session of its own: Ctrl-C reaches the driver only, which then stops the ranks in the right order.
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
        """Whether the agent has closed its output."""
        return not self._listener.is_alive()

    def lost(self) -> Failure:
        """Why the agent ended without a report. Returns at once."""
        code = self._process.poll()
        if self._fault:
            return self._failure(f"the output of its agent cannot be read ({self._fault}): a bug in stack")
        if code is None:
            return self._failure("its agent has closed its output and does not end: a bug in stack")
        words = last_line(self._log)
        what = "could not be reached, or was lost" if code == 255 and not self.host.here else f"lost its agent ({code})"
        return self._failure(f"{what}: {words}", separator=" ")

    def silent(self, passed_s: float) -> Failure | None:
        """A failure if the agent has written nothing for too long. The agent or its host is then stopped, and would not
        report a rank that fails.

        Args:
            passed_s: seconds since the last call.
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
                return self._failure(f"its agent (process {pid}) was stopped by SIGSTOP; a run needs its agents")
        return self._failure(f"its agent was silent for {limit:g} s; the host hangs, or the agent is stopped there")

    def _failure(self, what: str, separator: str = ": ") -> Failure:
        message = f"{self.host.name}{separator}{what}"
        return Failure("HostError", message, HostError.exit_code, rank=None, host=self.host.name)

    def save(self) -> None:
        """Asks the ranks to save and end; returns at once."""
        self._say(SAVE)

    def look(self) -> None:
        """Asks for the states of the ranks, when ranks hang; returns at once."""
        self._say(LOOK)

    def stop(self) -> None:
        """Asks the agent to end its ranks; returns at once."""
        if not self._told.is_set():
            self._told.set()
            self._say(STOP, last=True)

    def wait(self) -> None:
        """Returns when no process of the run is left on the host, or when this process cannot end the rest of them."""
        # An agent that is stopped cannot end its ranks.
        grace_s = 0.0 if self._is_silent else self._order.grace_s
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self._is_silent else 3 * grace_s + BEAT_S)
        # The session of an agent on this host may still hold ranks. For another host's agent the session holds ssh.
        end_session(self._process.pid, grace_s=grace_s)
        self._process.wait()

    def _say(self, line: bytes, *, last: bool = False) -> None:
        line_to_agent = self._process.stdin
        assert line_to_agent
        # An agent that is gone is noticed by the listener.
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
        except Exception as error:  # noqa: BLE001 - after any error the driver must not wait for this agent any more
            self._fault = f"{type(error).__name__}: {error}"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_S)

    def _take(self, line: bytes) -> None:
        """Reads one line of the agent. Ignores other lines, which a login shell may print."""
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
    """Starts the agents of a run. On exit, also after an exception, no process of the run is left."""
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
    """The last line of a log, without the lines in which launchers report what they start and stop."""
    # The log is missing if the run directory was removed.
    text = log.read_text(errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines()]
    told = [line for line in lines if line and not any(words in line for words in _CHATTER)]
    return told[-1] if told else "no error was printed"
