"""Watches the ranks that the agent of one host has started, from their start to their end."""

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from stack.launch.order import Order
from stack.launch.processes import Rank, local_ranks, signal_ranks
from stack.launch.verdict import Ended, Report
from stack.train import rundir
from stack.train.progress import Look, absent, look
from stack.train.rundir import RunDir

#: Seconds between two readings of the files of live ranks. All hosts of a run may read from the same file server.
_FILES_S = 2.0
#: Seconds for a rank to write its Python stack into its log.
_STACK_S = 0.3


class Watch:
    """Asks the kernel whether each rank of this host is alive, and reads the files of a rank once it is not."""

    def __init__(self, run: RunDir, order: Order, launchers: Sequence[subprocess.Popen]):
        self._run, self._order, self._launchers = run, order, launchers
        self.known: dict[int, Rank] = {}
        """Ranks of this host that have written rank.json."""
        self._elsewhere: set[int] = set()
        """Ranks on other hosts; one srun starts the ranks of all hosts."""
        self._own = {command.rank: process for command, process in zip(order.commands, launchers, strict=True)}
        self._done: dict[int, Ended] = {}
        self._failed: set[int] = set()
        self._asked: set[int] = set()
        self._read_files = -_FILES_S

    def report(self) -> Report:
        """The present state of the ranks and their launchers."""
        due = time.monotonic() - self._read_files >= _FILES_S
        if due:
            self._read_files = time.monotonic()
            self._find()
        codes = [launcher.poll() for launcher in self._launchers]
        # The first exit code that is not 0, because the other launchers may never end.
        code = next((code for code in codes if code), None if None in codes else 0)
        return Report(self._order.host, len(self._order.ranks), self._ended(read_errors=due), code)

    def ask_to_save(self) -> None:
        """Asks each rank of this host once to save, as soon as it has written rank.json. If one rank was asked, all
        ranks of the run save."""
        signal_ranks((rank for number, rank in self.known.items() if number not in self._asked), signal.SIGTERM)
        self._asked.update(self.known)
        if not self._asked and self._elsewhere:
            # With Slurm all ranks may be on other hosts. srun kills them on SIGTERM, and passes SIGUSR1 on to them.
            for launcher in self._launchers:
                launcher.send_signal(signal.SIGUSR1)
            self._asked.update(self._order.ranks)

    def look(self) -> list[Look]:
        """While ranks hang: the states of this host's ranks that have neither failed nor ended. Ranks that the others
        wait for write their Python stacks into their logs."""
        looks = look(self._run, self._order.ranks)
        working = [self.known[seen.rank] for seen in absent(looks) if seen.rank in self.known and not seen.stopped]
        signal_ranks(working, signal.SIGUSR2)
        if working:
            time.sleep(_STACK_S)
        return looks

    def _find(self) -> None:
        unseen = [rank for rank in self._order.ranks if rank not in self.known and rank not in self._elsewhere]
        here, elsewhere = local_ranks(self._run, unseen)
        self.known |= here
        self._elsewhere |= elsewhere

    def _is_alive(self, rank: int) -> bool:
        """Whether a rank is alive. For a rank without rank.json or on another host: whether its launcher is alive."""
        if rank in self.known:
            return self.known[rank].alive
        if rank in self._own:
            return self._own[rank].poll() is None
        return any(launcher.poll() is None for launcher in self._launchers)

    def _ended(self, *, read_errors: bool) -> list[Ended]:
        ended = []
        for rank in self._order.ranks:
            if rank not in self._done:
                alive = self._is_alive(rank)
                # A rank that has failed may still be ending.
                if alive and read_errors and (self._run.rank(rank) / "error.json").exists():
                    self._failed.add(rank)
                if alive and rank not in self._failed:
                    continue
                found = self._how(rank)
                if found.outcome != "done":
                    ended.append(found)
                    continue
                self._done[rank] = found
            ended.append(self._done[rank])
        return ended

    def _how(self, rank: int) -> Ended:
        folder = self._run.rank(rank)
        outcome = self._run.outcome(rank)
        about = rundir.read_json(folder / "rank.json")
        return Ended(
            rank,
            pid=about["pid"] if about else self._own[rank].pid if rank in self._own else None,
            outcome=outcome,
            error=rundir.read_json(folder / "error.json"),
            hung=outcome is None and _was_hung(folder / "log.txt"),
        )


def _was_hung(log: Path) -> bool:
    return log.exists() and "Watchdog caught collective operation timeout" in log.read_text(errors="replace")
