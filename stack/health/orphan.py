"""A rank must not outlive whoever started it: the launcher, and the agent above the launcher."""

import os
import threading
import time
from collections.abc import Callable

import psutil

from stack.errors import RankFailure

#: Set by the agent of a host for the ranks there: the agent's process id. The agent itself ends with the driver.
AGENT_PID = "STACK_AGENT_PID"
_POLL_S = 0.5
#: Looks after each other that find the agent stopped, a minute: it would not see that a rank fails, nor end it.
_STOPPED_LOOKS = 120


def exit_with_parent(last_words: Callable[[RankFailure], object]) -> None:
    """Starts a thread that ends this process, without collectives, once its parent or the agent is gone, or the agent
    has been stopped for a minute.

    The launcher ends its ranks when it is told to; a launcher or agent that was killed tells nobody. `last_words`
    gets the reason.
    """
    # In a container this may be the first process, which has no parent.
    watched = {"launcher": parent} if (parent := os.getppid()) else {}
    if agent := os.environ.get(AGENT_PID):
        watched["agent"] = int(agent)
    threading.Thread(target=_watch, args=(watched, last_words), daemon=True, name="orphan-watch").start()


def is_alive(process: psutil.Process) -> bool:
    """False from the moment it died, also while nobody has asked for its exit code yet."""
    try:
        # Compares the start time too, so that a reused process id is not mistaken for the old process.
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
        last_words(RankFailure(f"the {gone} (process {pids[gone]}) {how}, and its ranks end with it"))
    finally:
        # Also where one was gone before this could look.
        os._exit(RankFailure.exit_code)
