"""`python -m stack.train`: what every launcher starts on every rank."""

import os
import sys

from stack.train.worker import main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Without the interpreter's farewell: taking down process groups may wait for ranks that are gone.
        os._exit(code)
