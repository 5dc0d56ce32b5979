"""Runs the README's commands on a fresh clone, from several current folders. Only pip's cache is shared."""

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


def run(folder: Path, *command: str) -> str:
    """Runs a command without this test's own environment, checks that it succeeds, and returns its output."""
    # If `make test` runs this test, its MAKELEVEL and MAKEFLAGS would change the output of make.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "PYTHONPATH", "MAKE"))}
    done = subprocess.run(
        command, check=False, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_make_train_then_make_test_on_a_fresh_clone(clone, tmp_path):
    assert "make train" in README
    assert "make test" in README
    short = "train.steps=2 train.eval_every=2 train.eval_sequences=16 schedule.warmup_steps=1"
    began = time.monotonic()

    output = run(clone, "make", "train", f"ARGS={short}")

    seconds = time.monotonic() - began
    assert re.search(r"^\s*2/2\s", output, re.MULTILINE), output
    [done] = clone.glob("runs/quickstart/*/DONE.json")
    assert (done.parent / "curve.png").exists()
    # The time contains installation, preparing the corpus, starting the ranks, and two steps of training.
    print(f"fresh clone to a finished run of two steps: {seconds:.0f} s")
    assert seconds < 360
    assert " passed" in run(clone, "make", "test", "TESTS=tests/unit/test_lr.py tests/unit/test_house.py")
    # The commands also run from other folders. The parent folder contains a folder `stack` that is not the package.
    assert "ZeRO stage" in run(clone.parent, "make", "-C", clone.name, "plan")
    tiny = ["train.steps=1", "train.eval_every=0", "schedule.warmup_steps=0", "launch.ranks_per_node=2"]
    tiny.append(f"data.root={clone / 'data'}")
    for folder in (clone.parent, tmp_path):
        assert "curve: " in run(folder, str(clone / ".venv/bin/stack"), "train", *tiny)
        assert list(folder.glob("runs/run/*/DONE.json"))


def test_every_target_of_the_makefile_is_in_its_help(clone):
    output = run(clone, "make", "help")
    targets = re.findall(r"^([a-z-]+):", (clone / "Makefile").read_text(), re.MULTILINE)
    assert {line.split()[0] for line in output.splitlines()} == set(targets)


def test_what_the_readme_says_of_mistakes_is_what_is_printed():
    for command, printed in re.findall(r"^\$ (stack .*)\n(\w+Error: .*)$", README, re.MULTILINE):
        program, *arguments = command.split()
        words = [REPOSITORY / ".venv/bin" / program, *arguments]
        done = subprocess.run(words, check=False, capture_output=True, text=True)
        assert done.stderr.strip() == printed
        assert done.returncode in (3, 4)
