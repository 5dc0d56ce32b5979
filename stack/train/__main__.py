"""`python -m stack.train`: the program that every launcher starts on every rank."""

import atexit
import os
import sys

from stack.interpreter import leave_cwd

leave_cwd()

from stack.train.worker import main  # noqa: E402 - only after leave_cwd has removed the current folder from sys.path

if __name__ == "__main__":
    code = main(sys.argv[1:])
    if not code:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # os._exit skips the interpreter's shutdown. After a failure the shutdown could wait for ranks that have ended, when
    # it destroys process groups. After a success it could abort, if it ends a gloo thread that still frees a tensor.
    os._exit(code)
