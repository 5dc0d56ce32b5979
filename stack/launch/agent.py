"""`python -m stack.launch.agent`: on each host of a run, starts the ranks, watches them, and ends with the driver.

The driver holds the other end of its standard input, through ssh or not. The first line is an `Order`, then comes an
empty line every few seconds; `save` when the ranks are to save and end, and `stop` when they are to end at once. The
end of the input without a `stop`, or silence, is a driver or a connection that is gone: nobody would know of the ranks,
so they end too. On its standard output goes one line, a `Report`, when the first rank failed or the last one ended.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from io import RawIOBase
from pathlib import Path

from stack.errors import RankFailure
from stack.health.orphan import AGENT_PID
from stack.launch.processes import Rank, end_session, local_ranks, signal_ranks
from stack.launch.verdict import Ended, Report, first_failure
from stack.plan.policies import local_devices
from stack.train import rundir
from stack.train.rundir import RunDir
from stack.train.worker import VISIBLE_DEVICES

SAVE, STOP = b"save\n", b"stop\n"
_POLL_S = 0.2
#: After a first sign of failure, time for the rank that is the cause of it to show it.
_SETTLE_S = 2.0


@dataclass(frozen=True)
class Command:
    """A process to start."""

    argv: list[str]
    environment: dict[str, str]
    """Variables beside the host's own."""
    rank: int | None = None
    """The rank that the process is, where no launcher is between."""


@dataclass(frozen=True)
class Order:
    """What the driver asks of one host."""

    run: str
    """The run directory."""
    host: str
    ranks: list[int]
    """That come from these commands."""
    commands: list[Command]
    environment: dict[str, str]
    grace_s: float
    """Between SIGTERM and SIGKILL."""
    silence_s: float | None
    """Longest time without a word from the driver; None where the end of the input cannot get lost."""


class Lifeline:
    """The driver's end of the standard input."""

    def __init__(self, line: RawIOBase, silence_s: float | None):
        self._line, self._silence_s, self._heard = line, silence_s, time.monotonic()
        self.lost = False
        """The driver, or the connection to it, is gone."""
        self.save = False
        """The ranks are to save and end."""

    def holds(self, within_s: float) -> bool:
        """Whether the ranks are still wanted, after `within_s` seconds or as soon as they are not."""
        if select.select([self._line], [], [], within_s)[0]:
            heard = self._line.read(4096) or b""
            self._heard = time.monotonic()
            self.lost = not heard
            self.save = self.save or SAVE in heard
            return bool(heard) and STOP not in heard
        self.lost = self._silence_s is not None and time.monotonic() - self._heard > self._silence_s
        return not self.lost


def main() -> int:
    """Carries out one order, and returns 0 whatever became of the ranks."""
    with open(0, "rb", buffering=0) as line:
        raw = json.loads(line.readline())
        order = Order(**{**raw, "commands": [Command(**command) for command in raw["commands"]]})
        run, lifeline = RunDir(Path(order.run)), Lifeline(line, order.silence_s)
        ranks: dict[int, Rank] = {}
        try:
            launchers = _start(order)
            report = _watch(order, run, launchers, lifeline, ranks)
            if report:
                _tell(report)
            if lifeline.lost and 0 in order.ranks:
                _record_lost_driver(run)
        finally:
            # SIGTERM alone asks a rank that trains to save first.
            signal_ranks(ranks.values(), signal.SIGINT)
            # Whoever started this made it the leader of a session: all that comes of it is found there.
            end_session(os.getsid(0), grace_s=order.grace_s)
    return 0


def _start(order: Order) -> list[subprocess.Popen]:
    environment = {**_defaults(order), **os.environ, **order.environment, AGENT_PID: str(os.getpid())}
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        environment[VISIBLE_DEVICES] = os.environ["CUDA_VISIBLE_DEVICES"]
    # What they print goes where the agent's own errors go: to the launcher's log, with the driver.
    return [
        subprocess.Popen(
            command.argv,
            env={**environment, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
        )
        for command in order.commands
    ]


def _defaults(order: Order) -> dict[str, str]:
    """The cores of the host shared between its ranks, and no GPU where there is none."""
    threads = max(1, len(os.sched_getaffinity(0)) // len(order.ranks))
    defaults = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return defaults if local_devices() else {**defaults, "DS_ACCELERATOR": "cpu"}


def _watch(
    order: Order, run: RunDir, launchers: list[subprocess.Popen], lifeline: Lifeline, known: dict[int, Rank]
) -> Report | None:
    """Waits for the first failure, or for the end of all; None where the driver has no more use for the ranks.

    Args:
        known: takes the ranks of this host as they show up.
    """
    asked: set[int] = set()
    since: float | None = None
    while lifeline.holds(_POLL_S):
        known.update(local_ranks(run, order.ranks, known))
        if lifeline.save:
            _ask_to_save(run, order, known, launchers, asked)
        codes = [launcher.poll() for launcher in launchers]
        # The first that is not 0; the others may never end.
        code = next(filter(None, codes), None if None in codes else 0)
        report = Report(order.host, len(order.ranks), _ended(run, order, known, launchers), code)
        if report.well:
            return report
        if code is not None or any(rank.outcome != "done" for rank in report.ranks):
            since = since or time.monotonic()
            _, sure = first_failure([report])
            if sure or time.monotonic() - since > _SETTLE_S:
                return report
    return None


def _ask_to_save(
    run: RunDir, order: Order, known: dict[int, Rank], launchers: list[subprocess.Popen], asked: set[int]
) -> None:
    """Asks each rank of this host once, as soon as it has said who it is; one that trains is enough for all."""
    signal_ranks((rank for number, rank in known.items() if number not in asked), signal.SIGTERM)
    asked.update(known)
    places = [about["host"] for rank in order.ranks if (about := rundir.read_json(run.rank(rank) / "rank.json"))]
    if not asked and places and socket.gethostname() not in places:
        # They are elsewhere, on hosts of Slurm's. Its srun kills the ranks on SIGTERM, and passes SIGUSR1 on to them.
        for launcher in launchers:
            launcher.send_signal(signal.SIGUSR1)
        asked.update(order.ranks)


def _ended(run: RunDir, order: Order, known: dict[int, Rank], launchers: list[subprocess.Popen]) -> list[Ended]:
    """The ranks that are no more, those of other hosts (Slurm's) once nothing runs any more."""
    own = {command.rank: launcher for command, launcher in zip(order.commands, launchers, strict=True)}
    running = any(launcher.poll() is None for launcher in launchers)
    unseen = {rank: own[rank].poll() is None if rank in own else running for rank in order.ranks}
    alive = {rank for rank in order.ranks if (known[rank].alive if rank in known else unseen[rank])}
    ended = []
    for rank in order.ranks:
        outcome = run.outcome(rank)
        # One that failed may still be on its way out.
        if rank in alive and outcome != "error":
            continue
        about = rundir.read_json(run.rank(rank) / "rank.json")
        ended.append(
            Ended(
                rank,
                pid=about["pid"] if about else own[rank].pid if rank in own else None,
                outcome=outcome,
                error=rundir.read_json(run.rank(rank) / "error.json"),
                hung=outcome is None and _was_hung(run.rank(rank) / "log.txt"),
            )
        )
    return ended


def _was_hung(log: Path) -> bool:
    return log.exists() and "Watchdog caught collective operation timeout" in log.read_text(errors="replace")


def _tell(report: Report) -> None:
    try:
        print(json.dumps(asdict(report)), flush=True)
    except BrokenPipeError:
        # Or the interpreter's own flush at the end would fail again.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _record_lost_driver(run: RunDir) -> None:
    """Nobody else is there to say how the run ended."""
    if not run.done.exists() and not run.failed.exists():
        error = {
            "type": "RankFailure",
            "message": "the driver is gone, or the connection to it: its ranks end with it",
            "exit_code": RankFailure.exit_code,
        }
        rundir.write_last(run.failed, {**error, "time": time.time()})


if __name__ == "__main__":
    sys.exit(main())
