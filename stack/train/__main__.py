"""`python -m stack.train`: what every launcher starts on every rank."""

import sys

from stack.train.worker import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
