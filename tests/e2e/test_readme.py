"""The README's two commands on a fresh clone in an empty folder; only pip's cache is shared."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh") / "stack"
    if (REPOSITORY / ".git").exists():
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(folder)], check=True)
    else:
        shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns(".venv", "runs", "data"))
    return folder


def make(folder: Path, *arguments: str) -> tuple[str, float]:
    """Runs make as a user does, without this test's own environment; returns its output and the seconds it took."""
    # `make test` may be what runs this test, and its own MAKELEVEL and MAKEFLAGS change what make prints.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "PYTHONPATH", "MAKE"))}
    began = time.monotonic()
    command = ["make", *arguments]
    done = subprocess.run(
        command, check=False, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout, time.monotonic() - began


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_make_train_then_make_test_on_a_fresh_clone(clone):
    assert "make train" in README
    assert "make test" in README
    short = "train.steps=2 train.eval_every=2 train.eval_sequences=16 schedule.warmup_steps=1"

    output, seconds = make(clone, "train", f"ARGS={short}")

    assert re.search(r"^\s*2/2\s", output, re.MULTILINE), output
    [done] = clone.glob("runs/quickstart/*/DONE.json")
    assert (done.parent / "curve.png").exists()
    # With two steps of training in it. Setting up, preparing the corpus and starting are the rest.
    print(f"fresh clone to a finished run of two steps: {seconds:.0f} s")
    assert seconds < 360
    output, _ = make(clone, "test", "TESTS=tests/unit/test_lr.py tests/unit/test_house.py")
    assert " passed" in output


def test_every_target_of_the_makefile_is_in_its_help(clone):
    output, _ = make(clone, "help")
    targets = re.findall(r"^([a-z-]+):", (clone / "Makefile").read_text(), re.MULTILINE)
    assert {line.split()[0] for line in output.splitlines()} == set(targets)


def test_what_the_readme_says_of_mistakes_is_what_is_printed():
    for command, printed in re.findall(r"^\$ (stack .*)\n(\w+Error: .*)$", README, re.MULTILINE):
        program, *arguments = command.split()
        words = [REPOSITORY / ".venv/bin" / program, *arguments]
        done = subprocess.run(words, check=False, capture_output=True, text=True)
        assert done.stderr.strip() == printed
        assert done.returncode in (3, 4)
