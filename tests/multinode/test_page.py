"""Runs the commands of docs/multinode.md, as written there, between two hosts."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import Command
from tests.multinode.conftest import as_overrides

pytestmark = pytest.mark.ci

PAGE = Path(__file__).parents[2] / "docs" / "multinode.md"
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
HOSTFILE = next(block for block in BLOCKS if "slots=" in block)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith(("stack ", "deepspeed "))]


@pytest.fixture
def run(hosts, tiny, tmp_path):
    """Runs a line in a shell on host-a, with the hosts and folders of the test and a tiny model instead of the
    recipe."""
    names = {"node-0 slots=8": "host-a slots=1", "node-1 slots=8": "host-b slots=1"}
    hostfile = re.sub("|".join(names), lambda found: names[found[0]], HOSTFILE)
    assert hostfile.splitlines() == list(names.values())
    (tmp_path / "hosts" / "hosts-of-the-page").write_text(hostfile)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(line: str) -> None:
        for theirs, ours in (("/shared", str(tmp_path)), ("hosts ", "hosts-of-the-page "), (" experiment=8b", "")):
            line = line.replace(theirs, ours)
        own = [word.partition("=")[0] for word in shlex.split(line)]
        small = {key: value for key, value in tiny.items() if key not in {*own, "launch.ranks_per_node"}}
        shell = ["bash", "-c", f'{line} "$@"', "bash", *as_overrides(small)]
        command = Command(hosts.on("host-a", ["env", f"PATH={path}", *shell]), tmp_path)
        try:
            assert command.wait() == 0, command.stdout + command.stderr
        finally:
            command.kill()

    return run


def test_the_commands_of_the_page_train_on_both_hosts(run, tmp_path):
    data, driver, bare = COMMANDS
    run(data)
    assert list(tmp_path.glob("data/*"))
    for line in (driver, bare):
        before = set(tmp_path.glob("runs/*/*"))
        run(line)
        [new] = set(tmp_path.glob("runs/*/*")) - before
        assert (new / "DONE.json").exists()
        assert '"host-a"' in (new / "ranks/0/rank.json").read_text()
        assert '"host-b"' in (new / "ranks/1/rank.json").read_text()
