"""The driver's hold on the agents of a run, one on each host: their orders, the lifelines, their reports."""

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from stack.errors import HostError
from stack.launch.agent import SAVE, STOP, Order
from stack.launch.hosts import Host, module_on
from stack.launch.processes import end_session
from stack.launch.verdict import Ended, Failure, Report
from stack.train.rundir import RunDir

_BEAT_S = 5.0
#: Six beats. The driver may be slow; a host that is cut off must not train for ever.
SILENCE_S = 30.0
#: What the launchers say of what they start and stop; that is not why they ended.
_CHATTER = ("[launch.py:", " torch/distributed/", "=====", "-----")


class Agent:
    """One host's agent, from its start to its end."""

    def __init__(self, host: Host, order: Order, log: Path):
        """Starts it; what it and its launcher print goes to `log`."""
        self.host, self._order, self._log = host, order, log
        self.report: Report | None = None
        """None as long as its ranks are at work, and for ever where the agent was lost."""
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
        """Why the agent ended without a report."""
        code = self._process.wait()
        words = last_line(self._log)
        what = "could not be reached, or was lost" if code == 255 and not self.host.here else f"lost its agent ({code})"
        return Failure(
            "HostError", f"{self.host.name} {what}: {words}", HostError.exit_code, rank=None, host=self.host.name
        )

    def save(self) -> None:
        """Asks the ranks to save and end; returns at once."""
        self._say(SAVE)

    def stop(self) -> None:
        """Asks for the end of the ranks; returns at once."""
        if not self._told.is_set():
            self._told.set()
            self._say(STOP, last=True)

    def wait(self) -> None:
        """Returns when nothing of the run is left on the host, or nothing more can be done about it from here."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(3 * self._order.grace_s + _BEAT_S)
        # Of an agent that hangs or was killed, here; of ssh, which is then without its other end.
        end_session(self._process.pid, grace_s=self._order.grace_s)
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
        while not self._told.wait(_BEAT_S):
            self._say(b"\n")

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            fields = json.loads(line)
            self.report = Report(**{**fields, "ranks": [Ended(**rank) for rank in fields["ranks"]]})


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
