"""Files of lines on full disks, and files that are cut, changed or removed while they are written and read."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stack.observe.jsonl import Follower, MetricsWriter, read
from stack.observe.lines import Lines, Tail
from stack.train.output import own_output
from tests.helpers.full import no_room_beyond
from tests.helpers.rows import row


def steps_of(path: Path) -> list[int]:
    return [record.step for record in read(path)]


def test_rows_wait_for_room_and_are_written_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    told: list[str] = []
    writer, follower = MetricsWriter(path, tell=told.append), Follower(path)
    writer.write(row(1))
    size = path.stat().st_size
    with no_room_beyond(size + 100):
        for step in (2, 3, 4):
            writer.write(row(step))
        assert path.stat().st_size == size + 100
        assert steps_of(path) == [1]
        [line] = told
        assert line.startswith(f"{path} cannot be written (File too large): new lines are kept in memory")
        assert [record.step for record in follower.poll()] == [1]
    writer.write(row(5))
    writer.close()
    assert steps_of(path) == [1, 2, 3, 4, 5]
    assert [record.step for record in follower.poll()] == [2, 3, 4, 5]
    assert told[1:] == [f"{path} can be written again, and has the lines that were kept in memory"]


def test_rows_that_never_found_room_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    told: list[str] = []
    with no_room_beyond(10):
        writer = MetricsWriter(path, tell=told.append)
        for step in (1, 2):
            writer.write(row(step))
        writer.close()
    assert told[-1] == f"2 lines of {path} are lost, because they could not be written"
    # The next writer removes the unfinished row.
    MetricsWriter(path).close()
    assert path.read_bytes() == b""


def test_a_removed_file_is_made_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    told: list[str] = []
    writer, follower = MetricsWriter(path, tell=told.append), Follower(path, tell=told.append)
    writer.write(row(1))
    assert len(follower.poll()) == 1
    path.unlink()
    # The new file is larger than the old one, so its size alone does not show that it is another file.
    for step in (2, 3):
        writer.write(row(step))
    assert [record.step for record in follower.poll()] == [2, 3]
    assert steps_of(path) == [2, 3]
    [line] = told
    assert line.startswith(f"{path} was removed or replaced")
    writer.close()


@pytest.mark.parametrize("cut", [0, 100, "a row", "a row and a half"])
def test_a_file_that_is_cut_short_loses_no_later_row(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    told: list[str] = []
    writer = MetricsWriter(path, tell=told.append)
    follower = Follower(path)
    for step in (1, 2, 3):
        writer.write(row(step))
    assert len(follower.poll()) == 3
    one = path.stat().st_size // 3
    os.truncate(path, {"a row": one, "a row and a half": one * 3 // 2}.get(cut, cut))
    assert follower.poll() == []
    for step in (4, 5):
        writer.write(row(step))
    writer.close()
    assert [record.step for record in follower.poll()] == [4, 5]
    assert [record.step for record in read(path, skipped=told.append)][-2:] == [4, 5]
    assert "was changed by another process" in told[0]


@pytest.mark.parametrize("ended", [b"\n", b""])
@pytest.mark.parametrize(
    "garbage",
    [b"oops", b"\xff\xfe\0", b"[" * 200_000, b"9" * 5000, b"null", b"{}", row(2).to_json().encode()[:50]],
    ids=range(7),
)
def test_garbage_in_between_costs_a_line_and_no_row(tmp_path, garbage, ended):
    path = tmp_path / "metrics.jsonl"
    told: list[str] = []
    writer, follower = MetricsWriter(path), Follower(path, tell=told.append)
    writer.write(row(1))
    with path.open("ab") as file:
        file.write(garbage + ended)
    writer.write(row(2))
    with path.open("ab") as file:
        file.write(garbage + ended)
    writer.write(row(3))
    writer.close()
    assert [record.step for record in follower.poll()] == [1, 2, 3]
    [line] = told
    assert f"{path}:2 is not a metrics row" in line
    assert len(line) < 400
    assert [record.step for record in read(path, skipped=told.append)] == [1, 2, 3]
    assert told[1].endswith("the line is skipped, and so are 1 more")


@pytest.mark.parametrize(
    "changed",
    [{"step": 10**30}, {"step": -1}, {"loss": 10**400}, {"memory_peak_bytes": 10**400}, {"loss": [[1]]}],
)
def test_numbers_beyond_reason_are_no_row(tmp_path, changed):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{row(1).to_json()}\n{json.dumps({**row(2).to_dict(), **changed})}\n")
    assert Follower(path).poll() == [row(1)]


def test_a_folder_that_is_moved_takes_the_open_file_along(tmp_path):
    (tmp_path / "run").mkdir()
    told: list[str] = []
    writer = MetricsWriter(tmp_path / "run/metrics.jsonl", tell=told.append)
    writer.write(row(1))
    (tmp_path / "run").rename(tmp_path / "moved")
    writer.write(row(2))
    writer.close()
    assert steps_of(tmp_path / "moved/metrics.jsonl") == [1, 2]
    assert told == []


def test_a_tail_from_the_end_leaves_out_what_is_there(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("old\n")
    tail = Tail(path, from_end=True)
    Lines(path).add(b"new")
    assert tail.poll() == [b"new"]
    metrics = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(metrics)
    writer.write(row(1))
    writer.write(row(2))
    follower = Follower(metrics, from_end=True)
    metrics.unlink()
    metrics.write_text("".join(f"{row(step).to_json()}\n" for step in (1, 2, 3)))
    assert [record.step for record in follower.poll()] == [3]


def in_child(work: Callable[[], None]) -> int:
    """Calls `work` in a forked process, which may redirect its output; returns the exit code."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        work()
        code = 0
    finally:
        os._exit(code)


def test_a_log_on_a_full_disk_says_how_much_is_missing(tmp_path):
    log = tmp_path / "log.txt"

    def work() -> None:
        assert own_output(log, shown=False) is None
        print("first", flush=True)
        with no_room_beyond(10):
            print("0123456789", flush=True)
            print("\ud800 é", flush=True)
        print("last", flush=True)

    assert in_child(work) == 0
    assert log.read_text() == "first\n0123\n[17 bytes are missing here: the disk was full]\nlast\n"


def test_a_screen_that_takes_nothing_ends_nobody(tmp_path):
    def work() -> None:
        with open("/dev/full", "w") as full:
            os.dup2(full.fileno(), 1)
        print("a row", file=own_output(tmp_path / "log.txt", shown=True), flush=True)

    assert in_child(work) == 0
