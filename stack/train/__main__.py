"""`python -m stack.train`: what every launcher starts on every rank."""

import atexit
import os
import sys

from stack.interpreter import leave_cwd

leave_cwd()

from stack.train.worker import main  # noqa: E402 - not before the current folder is off the path

if __name__ == "__main__":
    code = main(sys.argv[1:])
    if not code:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's farewell. After a failure, taking down process groups may wait for ranks that are gone;
    # after a success, a thread of gloo's that still lets go of a tensor would be ended without unwinding, and abort.
    os._exit(code)
