"""`python -m stack` is the same as the `stack` command."""

import sys

from stack.interpreter import leave_cwd

leave_cwd()

from stack.cli.main import command  # noqa: E402 - a folder `stack/` in the current folder must not be imported

if __name__ == "__main__":
    sys.exit(command())
