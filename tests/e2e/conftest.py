"""One small corpus and one tiny model for all end-to-end runs."""

import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.runs import STACK, Command

#: Two layers, 38 thousand parameters: a run is its imports and little else.
_SHAPE = "{hidden_size:32,intermediate_size:64,num_hidden_layers:2,num_attention_heads:2,num_key_value_heads:1}"

Start = Callable[..., Command]


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c():
    # In the background of a shell Ctrl-C is ignored, and the commands would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Overrides of a tiny run on a prepared corpus, two ranks, pp2."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(200)]
    for number in range(12):
        (folder / f"{number:02}.txt").write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(100)))
    overrides: dict[str, object] = {
        "data.source": "files",
        "data.paths": f"[{folder}]",
        "data.root": folder / "prepared",
        "data.vocab_size": 300,
        "data.seq_len": 32,
        "model.config": _SHAPE,
        "batch.global_size": 8,
        "batch.micro_size": 1,
        "schedule.warmup_steps": 0,
        "train.steps": 5,
        "train.eval_every": 0,
        "launch.ranks_per_node": 2,
    }
    subprocess.run([STACK, "data", *as_overrides(overrides)], check=True, capture_output=True)
    return overrides


def as_overrides(settings: dict[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def start_in(tiny: dict[str, object]) -> Iterator[Start]:
    """`start_in(folder, {"key": value})` starts `stack train` on the tiny run; another `command` may replace it."""
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
    """`start_in` this test's own folder."""
    return lambda *arguments: start_in(tmp_path, *arguments)
