"""`python -m stack` is the same as the `stack` command."""

import sys

from stack.interpreter import leave_cwd

leave_cwd()

from stack.cli.main import main  # noqa: E402 - not before the current folder is off the path

if __name__ == "__main__":
    sys.exit(main())
