"""Following a run: its rows to the screen, and how it ended."""

import time
from collections.abc import Sequence
from dataclasses import replace

from stack.errors import HangError, RankFailure
from stack.launch.agents import Agent, last_line
from stack.launch.signals import Request, Requests
from stack.launch.verdict import Failure, blamed, first_failure
from stack.observe.console import Console
from stack.observe.jsonl import Follower, Tail
from stack.train.progress import Look
from stack.train.rundir import RunDir

_POLL_S = 0.2
#: After the first report that names no cause, time for other hosts to name it; ssh needs 15 s to miss one.
_SETTLE_S = 20.0
#: Time for the agents to say how their ranks stand, where ranks hang.
_LOOK_S = 3.0


def follow(
    agents: Sequence[Agent], run: RunDir, console: Console, requests: Requests, *, grace_s: float, saves: bool
) -> Failure | None:
    """Shows the run until it ends. The outcome is what the ranks say; a launcher's exit code has been seen to lie.

    Args:
        requests: each ends the run. Where it `saves`, the first one that asks for it has the ranks save and end.
    """
    # Of earlier attempts the user has seen the rows.
    metrics = Follower(run.metrics, from_end=True, tell=console.note)
    notes = Tail(run.notes, from_end=True)
    doubt: float | None = None
    saving = False
    looked = time.monotonic()
    while True:
        asked = requests.poll()
        if asked and asked[0].saves and saves and not saving and _may_train(run):
            saving = True
            how = f"the run is saved after this step, and ends; {_again(asked[0])} ends it at once"
            console.note(f"{asked[0].by}: {how}")
            for agent in agents:
                agent.save()
        interrupts = asked[1:] if saving else asked
        passed_s, looked = time.monotonic() - looked, time.monotonic()
        silent = next((failure for agent in agents if (failure := agent.silent(passed_s))), None)
        ended = all(agent.ended for agent in agents)
        failure, sure = (silent, True) if silent else _failure(agents, run)
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
            return _named(failure, agents) if sure or not saving else interrupted(asked[0])
        elif ended:
            return None
        time.sleep(_POLL_S)


def interrupted(request: Request) -> Failure:
    """Why a run ended that was told to end."""
    return Failure("Interrupted", f"stopped by {request.by}", request.exit_code)


def _may_train(run: RunDir) -> bool:
    """Whether there may be something to save: a rank is up. Before it trains it ends at once when it is asked."""
    return (run.rank(0) / "rank.json").exists()


def _again(request: Request) -> str:
    if request.by == "Ctrl-C":
        return "a second Ctrl-C"
    return "stack stop RUN --now" if request.by == "stack stop" else "another signal"


def _named(failure: Failure, agents: Sequence[Agent]) -> Failure:
    """Of a hang, by the rank that the others wait for: the agents whose ranks wait yet are asked how these stand."""
    if failure.exit_code != HangError.exit_code:
        return failure
    asked = [agent for agent in agents if agent.report is None and not agent.ended]
    for agent in asked:
        agent.look()
    deadline = time.monotonic() + _LOOK_S
    while time.monotonic() < deadline and not all(agent.report or agent.looks is not None for agent in asked):
        time.sleep(_POLL_S)
    return blamed(failure, [seen for agent in agents for seen in _looks(agent)])


def _looks(agent: Agent) -> list[Look]:
    return agent.report.looks if agent.report else agent.looks or []


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
