"""How `stack` starts further Python processes. They never search the current folder for modules: a folder `stack/` or a
file `psutil.py` there would be imported instead of the installed package."""

import os
import sys

#: Start of a command that runs a module: `[*PYTHON, "-m", "stack.train"]`. `-P` keeps the current folder off `sys.path`
#: and leaves PYTHONPATH in effect.
PYTHON = (sys.executable, "-P")
#: Environment variable with the effect of `-P`, which child processes inherit.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}


def leave_cwd() -> None:
    """Removes the current folder from `sys.path`, where `python -m` without `-P` puts it first. Called at the top of
    every `__main__`, because a user may start the module without `-P`."""
    if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
        del sys.path[0]
