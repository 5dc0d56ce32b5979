"""How this interpreter is started again. The folder in which a command runs is never searched for modules: a folder
`stack/` or a file `psutil.py` there would be imported in the place of the installed one, and run."""

import os
import sys

#: Starts a module: `[*PYTHON, "-m", "stack.train"]`. `-P` keeps the current folder off `sys.path`, PYTHONPATH stays.
PYTHON = (sys.executable, "-P")
#: What `-P` does, for a process and everything that is started from it.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}


def leave_cwd() -> None:
    """Takes the current folder off `sys.path`, where `python -m` without `-P` puts it first. For the first lines of a
    `__main__`: whoever starts it may not know of `-P`."""
    if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
        del sys.path[0]
