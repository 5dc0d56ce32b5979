"""Skips these tests where two hosts cannot be made, and says why. With STACK_REQUIRE_MULTINODE=1 they fail instead."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.forked import tiny_settings
from tests.helpers.runs import DEEPSPEED, STACK, Command
from tests.multinode.hosts import Hosts, two_hosts, why_not

Start = Callable[..., Command]
#: Slots of a hostfile with one rank on each host.
BOTH = {"host-a": 1, "host-b": 1}


@pytest.fixture(scope="session", autouse=True)
def _able() -> None:
    if reason := why_not():
        if os.environ.get("STACK_REQUIRE_MULTINODE") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def tiny() -> dict[str, object]:
    """Overrides of a tiny run on a prepared corpus, on two ranks in two stages, safe in the shell of another host."""
    settings = tiny_settings()
    # DeepSpeed's launcher quotes only words with a space, so bash on the other host would expand the braces.
    shape = str(settings.pop("model.config")).strip("{}").split(",")
    settings |= {f"model.config.{name}": value for name, value in (field.split(":") for field in shape)}
    subprocess.run([STACK, "data", *as_overrides(settings)], check=True, capture_output=True)
    return settings


def as_overrides(settings: dict[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    (tmp_path / "hosts").mkdir()
    with two_hosts(tmp_path / "hosts") as hosts:
        yield hosts


@pytest.fixture
def start(hosts: Hosts, tiny: dict[str, object], tmp_path: Path) -> Iterator[Start]:
    """`start({"key": value})` starts `stack train` on host-a: the tiny run with one stage on each host."""
    started: list[Command] = []

    def start(settings: dict[str, object] | None = None) -> Command:
        hostfile = hosts.hostfile(BOTH)
        overrides = {**tiny, "run.root": tmp_path / "runs", "launch.hostfile": hostfile, **(settings or {})}
        overrides.pop("launch.ranks_per_node")
        started.append(Command(hosts.on("host-a", [STACK, "train", *as_overrides(overrides)]), tmp_path))
        return started[-1]

    yield start
    for command in started:
        command.kill()


@pytest.fixture
def start_bare(hosts: Hosts, tiny: dict[str, object], tmp_path: Path) -> Iterator[Start]:
    """`start_bare({"host-a": 1, "host-b": 1}, {"key": value})` starts the `deepspeed` launcher itself on host-a."""
    started: list[Command] = []

    def start(slots: dict[str, int], settings: dict[str, object] | None = None) -> Command:
        launcher = [DEEPSPEED, "--hostfile", str(hosts.hostfile(slots)), "--no_local_rank", "--module", "stack.train"]
        overrides = as_overrides({**tiny, "run.root": tmp_path / "runs", **(settings or {})})
        started.append(Command(hosts.on("host-a", [*launcher, *overrides]), tmp_path))
        return started[-1]

    yield start
    for command in started:
        command.kill()
