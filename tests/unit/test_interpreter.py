"""The folder in which a command runs is never imported as code."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import stack
from stack.interpreter import PYTHON
from stack.launch.hosts import Host, module_on
from stack.launch.probe import About, Question


@pytest.fixture
def trap(tmp_path) -> Path:
    """A folder with an empty folder `stack/`, and modules that create a file when they are imported."""
    (tmp_path / "stack").mkdir()
    for name in ("psutil", "torch", "yaml", "omegaconf", "rich"):
        (tmp_path / f"{name}.py").write_text(
            "import pathlib; pathlib.Path('sprung').touch(); raise ImportError('trap')"
        )
    return tmp_path


def test_the_probe_and_all_that_starts_with_python_pass_by_the_trap(trap):
    import json

    question = json.dumps(asdict(Question(str(trap), "token", "answer", None, 0.0)))
    command = module_on(Host("here", 1, here=True), "stack.launch.probe")
    done = subprocess.run(command, cwd=trap, input=question, capture_output=True, text=True, check=True)
    assert About.from_json(done.stdout).python == sys.executable
    done = subprocess.run([*PYTHON, "-m", "stack", "--version"], cwd=trap, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == stack.__version__
    assert not (trap / "sprung").exists()


@pytest.mark.parametrize("module", ["stack", "stack.train"])
def test_a_bare_python_m_takes_the_folder_off_its_path(trap, module):
    # `python -m` itself looks for `stack` in the current folder; the imports of stack must not.
    (trap / "stack").rmdir()
    done = subprocess.run(
        [sys.executable, "-m", module, "ls", "--nothing"], cwd=trap, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert done.returncode in (2, 3), done.stderr
    assert not (trap / "sprung").exists()


def test_a_stack_that_only_pythonpath_names_works(trap):
    command = [*PYTHON, "-S", "-c", "import stack; print(stack.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(Path(stack.__file__).parents[1])}
    done = subprocess.run(command, cwd=trap, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == stack.__file__
