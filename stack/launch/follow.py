"""Follows a run: shows its rows on the screen, and finds out how it ended."""

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
#: After the first report that names no cause, seconds to wait for one that does. ssh notices a lost host after 15 s.
_SETTLE_S = 20.0
#: When ranks hang, seconds for the agents to report the states of their ranks.
_LOOK_S = 3.0


def follow(
    agents: Sequence[Agent], run: RunDir, console: Console, requests: Requests, *, grace_s: float, saves: bool
) -> Failure | None:
    """Shows the run until it ends. The outcome comes from the files of the ranks, because launchers have exited with 0
    after a rank was killed.

    Args:
        requests: each ends the run. If the run `saves` and the first request allows it, the ranks save before they end.
        saves: whether the run writes checkpoints.
    """
    # The rows of earlier attempts are not shown again.
    metrics = Follower(run.metrics, from_end=True, tell=console.note)
    notes = Tail(run.notes, from_end=True)
    doubt: float | None = None
    saving = False
    looked = time.monotonic()
    while True:
        asked = requests.poll()
        if asked and asked[0].saves and saves and not saving and _may_train(run):
            saving = True
            how = f"the run is saved after this step, and ends; {_again(asked[0])} ends the run at once"
            console.note(f"{asked[0].by}: {how}")
            for agent in agents:
                agent.save()
        interrupts = asked[1:] if saving else asked
        passed_s, looked = time.monotonic() - looked, time.monotonic()
        silent = next((failure for agent in agents if (failure := agent.silent(passed_s))), None)
        ended = all(agent.ended for agent in agents)
        failure, sure = (silent, True) if silent else _failure(agents, run)
        doubt = (doubt or time.monotonic()) if failure else None
        # After a second request the terminal may be closed.
        if not interrupts:
            _show(notes, metrics, console)
        if run.done.exists():
            if ended or _is_overdue(run, grace_s):
                return None
        elif interrupts:
            return interrupted(interrupts[0])
        elif not run.config.exists():
            return Failure("RankFailure", f"{run.path} was removed, so its ranks end too", RankFailure.exit_code)
        elif failure and (sure or ended or (doubt and time.monotonic() - doubt > _SETTLE_S)):
            # Ranks that were asked to save before they trained had nothing to save, and ended at once.
            return _named(failure, agents) if sure or not saving else interrupted(asked[0])
        elif ended:
            return None
        time.sleep(_POLL_S)


def interrupted(request: Request) -> Failure:
    """The failure of a run that was asked to end."""
    return Failure("Interrupted", f"stopped by {request.by}", request.exit_code)


def _may_train(run: RunDir) -> bool:
    """Whether there may be something to save: rank 0 has started. Before a rank trains, it ends without a save."""
    return (run.rank(0) / "rank.json").exists()


def _again(request: Request) -> str:
    if request.by == "Ctrl-C":
        return "a second Ctrl-C"
    return "stack stop RUN --now" if request.by == "stack stop" else "another signal"


def _named(failure: Failure, agents: Sequence[Agent]) -> Failure:
    """For a hang, asks the agents for the states of their ranks, and names the rank that the others wait for."""
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
    """The failure as far as it is known now, and whether no later report of another host can change it."""
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
    """Whether the run has been done for `grace_s` seconds; only called while some process of it has not ended."""
    return time.time() - run.done.stat().st_mtime > grace_s
