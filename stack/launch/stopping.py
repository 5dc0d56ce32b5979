"""`stack stop`: asks a run to end, from any shell and any host that sees its directory, and waits until it has."""

import time

from stack.errors import StackError, UsageError
from stack.launch.standing import DONE, ENDED, FAILED, RUNNING, SAVED, standing
from stack.train import stop_request
from stack.train.lock import Holder
from stack.train.rundir import RunDir

_POLL_S = 0.2


def stop(run: RunDir, *, now: bool, timeout_s: float) -> int:
    """Asks a run to save and end, or with `now` to end at once; prints how it ended, and returns 0 once it has.

    Raises:
        UsageError: it is not at work, or its directory cannot be written.
        StackError: it is still at work after `timeout_s` seconds.
    """
    me = Holder.me()
    found = standing(run, me)
    if found.state != RUNNING:
        raise UsageError(f"{run.path} is not running: {found}")
    try:
        stop_request.ask(run, now=now)
    except OSError as error:
        raise UsageError(f"{run.path} cannot be written ({error.strerror}); ask as the user who started it") from error
    print(f"asked the run to {'end at once' if now else 'save and end'} ({found.why})", flush=True)
    deadline = time.monotonic() + timeout_s
    while (found := standing(run, me)).state == RUNNING:
        if time.monotonic() > deadline:
            more = "end it by hand" if now else f"wait, or end it at once: stack stop {run.path} --now"
            raise StackError(f"{run.path} is still at work after {timeout_s:g} s ({found.why}); {more}")
        time.sleep(_POLL_S)
    print(found)
    # One that saved says so itself.
    if found.state in (FAILED, ENDED):
        print(f"to go on: {run.resume_command}")
    return 0 if found.state in (DONE, SAVED) or now else found.exit_code
