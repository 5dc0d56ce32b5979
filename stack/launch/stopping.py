"""`stack stop`: asks a run to end, from any host that sees its run directory, and waits until the run has ended."""

import time

from stack.errors import StackError, UsageError
from stack.launch.standing import DONE, ENDED, FAILED, RUNNING, SAVED, standing
from stack.train import stop_request
from stack.train.lock import Holder
from stack.train.rundir import RunDir

_POLL_S = 0.2


def stop(run: RunDir, *, now: bool, timeout_s: float) -> int:
    """Asks a run to save and end, or with `now` to end at once. Prints how the run ended, and returns the exit code.

    Raises:
        UsageError: the run is not running, or its directory cannot be written.
        StackError: the run is still running after `timeout_s` seconds.
    """
    me = Holder.me()
    found = standing(run, me)
    if found.state != RUNNING:
        raise UsageError(f"{run.path} is not running: {found}")
    try:
        stop_request.ask(run, now=now)
    except OSError as error:
        raise UsageError(
            f"{run.path} cannot be written ({error.strerror}); stop it as the user who started it"
        ) from error
    print(f"asked the run to {'end at once' if now else 'save and end'} ({found.why})", flush=True)
    deadline = time.monotonic() + timeout_s
    while (found := standing(run, me)).state == RUNNING:
        if time.monotonic() > deadline:
            more = "kill that process" if now else f"wait longer, or end the run at once: stack stop {run.path} --now"
            raise StackError(f"{run.path} is still running after {timeout_s:g} s ({found.why}); {more}")
        time.sleep(_POLL_S)
    print(found)
    # The message of a run that saved already says how to resume.
    if found.state in (FAILED, ENDED):
        print(f"to go on: {run.resume_command}")
    return 0 if found.state in (DONE, SAVED) or now else found.exit_code
