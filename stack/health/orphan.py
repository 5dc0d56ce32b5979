"""Ends a rank whose launcher, or the agent above the launcher, is gone."""

import os
import threading
import time
from collections.abc import Callable

import psutil

from stack.errors import RankFailure

#: The process id of a host's agent, set by the agent for its ranks. The agent itself ends with the driver.
AGENT_PID = "STACK_AGENT_PID"
_POLL_S = 0.5
#: Polls in a row that find the agent stopped: one minute. A stopped agent sees no failing rank, and ends none.
_STOPPED_LOOKS = 120


def exit_with_parent(last_words: Callable[[RankFailure], object]) -> None:
    """Starts a thread that ends this process, without collectives, once its parent or the agent is gone, or the agent
    has been stopped for a minute.

    A launcher that receives a signal ends its ranks. A launcher or agent that was killed by SIGKILL cannot.
    `last_words` gets the reason.
    """
    # In a container this process may be the first one, which has no parent.
    watched = {"launcher": parent} if (parent := os.getppid()) else {}
    if agent := os.environ.get(AGENT_PID):
        watched["agent"] = int(agent)
    threading.Thread(target=_watch, args=(watched, last_words), daemon=True, name="orphan-watch").start()


def is_alive(process: psutil.Process) -> bool:
    """False from the moment the process died, also while its parent has not yet read the exit code."""
    try:
        # is_running compares the start time too, so that a reused process id is not mistaken for the old process.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _watch(pids: dict[str, int], last_words: Callable[[RankFailure], object]) -> None:
    try:
        watched = {name: psutil.Process(pid) for name, pid in pids.items()}
        stopped = 0
        while all(map(is_alive, watched.values())) and stopped < _STOPPED_LOOKS:
            stopped = stopped + 1 if "agent" in watched and _is_stopped(watched["agent"]) else 0
            time.sleep(_POLL_S)
        gone = next((name for name, process in watched.items() if not is_alive(process)), "agent")
        how = "was stopped" if stopped == _STOPPED_LOOKS else "was killed"
        last_words(RankFailure(f"the {gone} (process {pids[gone]}) {how}, so its ranks end too"))
    finally:
        # Also if the launcher or agent was gone before the first poll.
        os._exit(RankFailure.exit_code)
