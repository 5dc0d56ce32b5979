"""`python -m stack` is the same as the `stack` command."""

import sys

from stack.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
