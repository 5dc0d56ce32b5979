"""Files are written whole or not at all, also on a full disk, and damaged input raises the documented errors."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from stack import disk
from tests.helpers.full import no_room_beyond


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, durable):
    path = tmp_path / "file"
    disk.write_whole(path, "old", durable=durable)
    with no_room_beyond(10), pytest.raises(OSError, match="File too large"):
        disk.write_whole(path, "x" * 100, durable=durable)
    assert path.read_text() == "old"
    disk.write_whole(path, b"\xff", durable=durable)
    assert path.read_bytes() == b"\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_name_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: disk.write_whole(path, str(number) * 100), range(400)))
    assert len(set(path.read_text())) <= 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
def test_of_several_that_make_a_file_one_does(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_: object) -> None:
            raise PermissionError

        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: disk.write_new(path, str(number)), range(40)))
    assert sum(made) == 1
    assert path.read_text() == str(made.index(True))
    assert list(tmp_path.iterdir()) == [path]


def test_reserved_room_is_used_without_a_new_byte(tmp_path):
    disk.reserve(tmp_path)
    with no_room_beyond(0), pytest.raises(OSError, match="File too large"):
        disk.write_whole(tmp_path / "done.json", "{}")
    # RLIMIT_FSIZE forbids writes beyond the limit even in a file that is longer already.
    with no_room_beyond(16):
        disk.write_reserved(tmp_path / "done.json", "{}")
    assert (tmp_path / "done.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["done.json"]
    disk.write_reserved(tmp_path / "error.json", "{}")
    disk.release(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match="it is no regular file"):
            disk.read_regular(path)
    with pytest.raises(FileNotFoundError):
        disk.read_regular(tmp_path / "missing")


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, '{"a":' * 200_000, "9" * 5000, b"\xff\xfe\xff"])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011 - whatever the parser says
        disk.parse_json(text)


SIZES = {0: "0 bytes", 999: "999 bytes", 1500: "1.5 KB", 13_400_000: "13.4 MB", 10**13: "10.0 TB"}


@pytest.mark.parametrize("count", SIZES)
def test_sizes_are_never_zero_of_something(count):
    assert disk.size(count) == SIZES[count]
