"""Neither a full disk under run.root nor damage to metrics.jsonl ends a healthy run."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stack.checkpoint import manifest as manifests
from stack.health.faults import FAULT
from stack.observe.jsonl import read
from stack.train.rundir import RunDir, read_json
from tests.helpers.forked import tiny_again, tiny_run

#: Steps in which rank 0 sleeps for a second, so that the test can change the disk meanwhile. The disk page in which
#: metrics.jsonl ends when the disk becomes full still has room for about ten rows.
_SLOW = (4, 24)
_STEPS = 28
_SLEEPS = ";".join(f"sleep:rank=0,step={step},phase=save.stage,seconds=1" for step in _SLOW)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    made = subprocess.run(mount, check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mounting needs root: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """Fills the disk with a file until no byte is free; returns the file."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    return filler


def wait_for(probe, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def log(run: RunDir) -> str:
    return "\n".join(path.read_text() for path in run.path.glob("ranks/*/log.txt"))


@pytest.mark.parametrize("room", ["again", "never"])
def test_a_full_disk_costs_lines_and_not_the_run(zygote, small_disk, tmp_path, room):
    settings = {
        "run.root": small_disk / "runs",
        "checkpoint.path": tmp_path / "checkpoints",
        "checkpoint.every": 2,
        "train.steps": _STEPS,
    }
    run = tiny_run(tmp_path, settings)
    root = manifests.root_of(str(tmp_path / "checkpoints"), run.path)
    with ThreadPoolExecutor() as pool:
        codes = pool.submit(zygote.run, ["--config", str(run.config)], 2, env={FAULT: _SLEEPS})
        wait_for(lambda: run.metrics.exists() and len(read(run.metrics)) == _SLOW[0] - 1)
        filler = fill(small_disk)
        wait_for(lambda: manifests.steps(root)[-1:] == [_SLOW[1] - 2])
        assert len(read(run.metrics)) < 15
        if room == "again":
            filler.unlink()
        assert codes.result() == [0, 0], log(run)
    assert [run.outcome(rank) for rank in (0, 1)] == ["done", "done"]
    notes = run.notes.read_text()
    assert f"{run.metrics} cannot be written (No space left on device)" in notes
    if room == "again":
        assert "can be written again" in notes
        assert [record.step for record in read(run.metrics)] == list(range(1, _STEPS + 1))
        assert read_json(run.done)["step"] == _STEPS
        assert run.curve.exists()
    else:
        filler.unlink()
        assert "Traceback" not in log(run)
        # The run directory on the full disk can be resumed.
        assert zygote.run(["--config", str(tiny_again(run, {"train.steps": _STEPS + 2}).config)], 2) == [0, 0], log(run)
        assert read_json(run.done)["step"] == _STEPS + 2


@pytest.mark.parametrize("damage", ["garbage", "truncated", "removed"])
def test_a_damaged_metrics_file_costs_a_line_and_not_the_run(zygote, tmp_path, damage):
    run = tiny_run(tmp_path, {"checkpoint.every": 2, "train.steps": 8})

    def break_it() -> None:
        wait_for(lambda: run.metrics.exists() and len(read(run.metrics)) == _SLOW[0] - 1)
        if damage == "garbage":
            with run.metrics.open("a") as file:
                file.write("garbage\n")
        elif damage == "truncated":
            os.truncate(run.metrics, 0)
        else:
            run.metrics.unlink()

    breaking = threading.Thread(target=break_it)
    breaking.start()
    assert zygote.run(["--config", str(run.config)], 2, env={FAULT: _SLEEPS}) == [0, 0], log(run)
    breaking.join()
    told: list[str] = []
    found = [record.step for record in read(run.metrics, skipped=told.append)]
    assert found == list(range(1 if damage == "garbage" else _SLOW[0], 9))
    assert len(told) == (damage == "garbage")
    assert run.curve.exists()
    notes = run.notes.read_text()
    assert str(run.metrics) in notes
    # The run says that faults of tests are active, since the variable may be set by mistake.
    assert f"{FAULT}={_SLEEPS}: faults of tests will happen in this run" in notes
