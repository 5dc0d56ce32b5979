"""A wrong command is refused with one line, before a process is started or a file is written."""

import resource

import pytest

from tests.helpers.runs import STACK

#: Name -> (overrides, exit code, words of the message). All are refused before torch is imported.
CASES = {
    "unknown key": ({"optim.lrr": 1}, 3, "did you mean optim.lr?"),
    "impossible layout": ({"parallel.pipeline": 3, "launch.ranks_per_node": 4}, 4, "does not divide 4 ranks"),
    "several hosts": ({"launch.nodes": 2}, 4, "launch.hostfile=FILE"),
    "no corpus": ({"data.paths": "[/nowhere]"}, 5, "/nowhere"),
    "root cannot be written": ({"run.root": "/proc/runs"}, 3, "run.root=/proc/runs"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line(start, tmp_path, name):
    settings, exit_code, words = CASES[name]
    before = _cpu_seconds()
    command = start(settings)

    assert command.wait() == exit_code
    assert words in command.stderr
    assert command.stderr.count("\n") == 1
    assert command.stdout == ""
    assert not (tmp_path / "runs").exists()
    assert _cpu_seconds() - before < 2


def test_an_unknown_verb_is_one_line(start):
    command = start({}, (STACK, "tarin"))

    assert command.wait() == 2
    assert command.stderr == "UsageError: tarin: no such verb; use train\n"


def test_a_closed_output_is_no_mistake(start):
    command = start({}, ("bash", "-c", '"$@" <&- >&- 2>&-', "bash", STACK, "plan"))

    assert command.wait() == 0


def _cpu_seconds() -> float:
    """CPU time of the finished child processes, which does not depend on how busy the machine is."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
