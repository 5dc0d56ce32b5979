"""Fixtures of the end-to-end tests, which share one small corpus and one tiny model."""

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.forked import tiny_settings
from tests.helpers.runs import STACK, Command

Start = Callable[..., Command]


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c():
    # A process in the background of a shell ignores Ctrl-C, and the commands would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny() -> dict[str, object]:
    """Overrides of a tiny run on a prepared corpus, on two ranks in two pipeline stages."""
    overrides = {**tiny_settings(), "log.wandb.mode": "offline"}
    subprocess.run([STACK, "data", *as_overrides(overrides)], check=True, capture_output=True)
    return overrides


def as_overrides(settings: dict[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def start_in(tiny: dict[str, object]) -> Iterator[Start]:
    """`start_in(folder, {"key": value})` starts `stack train` with the tiny run; `command` may replace `stack
    train`."""
    started: list[Command] = []

    def start(folder: Path, settings: dict[str, object] | None = None, command: tuple[str, ...] = (STACK, "train")):
        overrides = {**tiny, "run.root": folder / "runs", **(settings or {})}
        started.append(Command([*command, *as_overrides(overrides)], folder))
        return started[-1]

    yield start
    for command in started:
        command.kill()


@pytest.fixture
def start(start_in: Start, tmp_path: Path) -> Start:
    """`start_in` with the test's own folder."""
    return lambda *arguments: start_in(tmp_path, *arguments)
