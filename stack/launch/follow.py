"""Following a run: its rows to the screen, and how it ended."""

import signal
import time
from collections.abc import Sequence
from dataclasses import replace

from stack.errors import RankFailure
from stack.health.stopped import SIGNALLED
from stack.launch.agents import Agent, last_line
from stack.launch.verdict import Failure, first_failure
from stack.observe.console import Console
from stack.observe.jsonl import Follower, Tail
from stack.train.rundir import RunDir

_POLL_S = 0.2
#: After the first report that names no cause, time for other hosts to name it; ssh needs 15 s to miss one.
_SETTLE_S = 20.0


def follow(
    agents: Sequence[Agent],
    run: RunDir,
    console: Console,
    requests: list[signal.Signals],
    *,
    grace_s: float,
    saves: bool,
) -> Failure | None:
    """Shows the run until it ends. The outcome is what the ranks say; a launcher's exit code has been seen to lie.

    Args:
        requests: signals as they come in. Each ends the run; but where it `saves`, a first SIGTERM has the ranks save
            and end.
    """
    # Of earlier attempts the user has seen the rows.
    metrics = Follower(run.metrics, from_end=True, tell=console.note)
    notes = Tail(run.notes, from_end=True)
    doubt: float | None = None
    saving = False
    while True:
        if saves and not saving and requests[:1] == [signal.SIGTERM]:
            saving = True
            console.note("SIGTERM: the run is saved after this step, and ends; another signal ends it at once")
            for agent in agents:
                agent.save()
        interrupts = requests[1:] if saving else requests
        ended = all(agent.ended for agent in agents)
        failure, sure = _failure(agents, run)
        doubt = (doubt or time.monotonic()) if failure else None
        # A terminal that was closed takes no lines.
        if not interrupts:
            _show(notes, metrics, console)
        if run.done.exists():
            if ended or _is_overdue(run, grace_s):
                return None
        elif interrupts:
            return interrupted(interrupts[0])
        elif not run.config.exists():
            return Failure("RankFailure", f"{run.path} was removed; its ranks end with it", RankFailure.exit_code)
        elif failure and (sure or ended or (doubt and time.monotonic() - doubt > _SETTLE_S)):
            # Ranks that did not train yet had nothing to save, and ended at once.
            return failure if sure or not saving else interrupted(signal.SIGTERM)
        elif ended:
            return None
        time.sleep(_POLL_S)


def interrupted(number: signal.Signals) -> Failure:
    """Why a run ended that was told to end."""
    return Failure("Interrupted", f"stopped by {_name(number)}", SIGNALLED + number)


def _failure(agents: Sequence[Agent], run: RunDir) -> tuple[Failure | None, bool]:
    """What went wrong as far as it can be seen now, and whether no other host can have a better reason."""
    reports = [agent.report for agent in agents if agent.report and not agent.report.well]
    failure, sure = first_failure(reports)
    if sure:
        return failure, True
    lost = [agent for agent in agents if agent.ended and agent.report is None]
    if lost:
        return lost[0].lost(), True
    if failure and failure.rank is None and failure.host:
        words = last_line(run.launcher_log(failure.host))
        failure = replace(failure, message=f"{failure.message}: {words}")
    return failure, False


def _show(notes: Tail, metrics: Follower, console: Console) -> None:
    for line in notes.poll():
        console.note(line.decode(errors="replace"))
    for record in metrics.poll():
        console.step(record)


def _is_overdue(run: RunDir, grace_s: float) -> bool:
    """Whether the run is done, and yet some process of it does not end."""
    return time.time() - run.done.stat().st_mtime > grace_s


def _name(number: signal.Signals) -> str:
    return "Ctrl-C" if number == signal.SIGINT else number.name
