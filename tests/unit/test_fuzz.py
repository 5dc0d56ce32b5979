"""With random command lines `stack plan` either prints a plan or refuses with one line, within two CPU seconds."""

import re
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from stack.config.compose import compose, from_yaml, to_yaml
from stack.errors import StackError
from stack.plan.layout import make_plan
from stack.plan.report import render
from tests.helpers.fuzz import Fuzz

#: Largest CPU time of one command line in seconds, with warm or cold caches of the process.
_MOST_S = 2.0


def outcome(line: list[str]) -> str | None:
    """The message that refuses the line; None where it can be planned."""
    try:
        cfg = compose(line)
        render(make_plan(cfg), cfg)
    except StackError as error:
        return f"{type(error).__name__}: {error}"
    return None


def keys_of(line: list[str]) -> set[str]:
    """The words that a message about the line may contain: the key of each override, the last part of the key, or a
    file that is the value."""
    found = set()
    for override in line:
        key, _, value = override.lstrip("+~-").partition("=")
        found |= {key, key.rpartition(".")[2]} - {""} | ({value} if "/" in value else set())
    return found


def is_left_by_a_choice(line: list[str], told: str) -> bool:
    """Whether the message is about a key that does not occur in the line itself: a key of a recipe in the line, or a
    key of a preset that does not fit the model in the line."""
    if any(override.startswith("experiment=") for override in line):
        return True
    return ": model." in told and any(override.startswith(("model=", "model.name=")) for override in line)


@pytest.mark.parametrize(
    ("seed", "count"),
    [(1, 100), pytest.param(1, 500, marks=pytest.mark.ci), pytest.param(2, 10_000, marks=pytest.mark.slow)],
)
@pytest.mark.timeout(3600)
def test_any_line_is_planned_or_refused_in_one_line(
    seed: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    outcomes: Counter[str] = Counter()
    slowest = (0.0, [""])
    for line in islice(Fuzz(tmp_path, seed).lines(), count):
        began = time.process_time()
        told = outcome(line)
        took = time.process_time() - began
        slowest = max(slowest, (took, line))
        assert took < _MOST_S, (took, line)
        outcomes["planned" if told is None else "refused"] += 1
        if told is not None:
            assert told.startswith(("ConfigError: ", "LayoutError: ")), (line, told)
            assert told.isprintable(), (line, told)
            assert len(told) < 1500, (line, told)
            assert any(key in told for key in keys_of(line)) or is_left_by_a_choice(line, told), (line, told)
    with capsys.disabled():
        print(f"\n{count} lines, {dict(outcomes)}; slowest {slowest[0]:.2f} s CPU: {' '.join(slowest[1])[:200]}")
    assert outcomes["planned"] > count / 20


def test_a_planned_line_is_saved_and_read_back_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    saved = tmp_path / "config.yaml"
    for line in islice((line for line in Fuzz(tmp_path, 3).lines() if outcome(line) is None), 20):
        cfg = compose(line)
        saved.write_text(to_yaml(cfg))
        assert from_yaml(saved) == cfg, line
    assert re.search("^model:", saved.read_text(), re.MULTILINE)
