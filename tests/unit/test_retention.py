"""The choice of checkpoints to keep, and deletions that are interrupted."""

import pytest

from stack.checkpoint import manifest, retention
from stack.config.schema import Checkpoint

_SAVED: dict[int, float | None] = {10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: 1.0, 60: 4.0}


@pytest.mark.parametrize(
    ("keep", "deleted"),
    [
        ({"keep_last": 2}, [10, 20, 30, 40]),
        ({"keep_last": 1}, [10, 20, 30, 40, 50]),
        ({"keep_last": 9}, []),
        ({"keep_last": 1, "keep_every": 20}, [10, 30, 50]),
        ({"keep_last": 1, "keep_best": 1}, [10, 30, 40, 50]),
        ({"keep_last": 1, "keep_best": 3}, [10, 30]),
        ({"keep_last": 1, "keep_every": 30, "keep_best": 1}, [10, 40, 50]),
    ],
)
def test_what_no_rule_keeps_goes(keep, deleted):
    assert retention.superfluous(_SAVED, Checkpoint(**keep)) == deleted


@pytest.fixture
def root(tmp_path):
    for step in (10, 20):
        folder = manifest.folder_of(tmp_path, step)
        folder.mkdir()
        for name in ("manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"):
            (folder / name).write_bytes(bytes(100))
    return tmp_path


class Killed(BaseException):
    """Stands for the end of the process."""


def killed(*_: object) -> None:
    raise Killed


def kill_in_the_middle(folder):
    """Deletes one file of a folder, then raises `Killed`."""
    next(folder.iterdir()).unlink()
    raise Killed


@pytest.mark.parametrize(
    ("how", "left"),
    [({"rename": killed}, [10, 20]), ({"remove": killed}, [20]), ({"remove": kill_in_the_middle}, [20])],
)
def test_a_deletion_that_is_killed_leaves_a_whole_checkpoint_or_none(root, how, left):
    with pytest.raises(Killed):
        retention.delete(root, 10, **how)
    assert manifest.steps(root) == left
    for step in left:
        assert len(list(manifest.folder_of(root, step).iterdir())) == 3
    retention.clear(root)
    assert sorted(path.name for path in root.iterdir()) == [manifest.folder_of(root, step).name for step in left]


def test_a_second_deletion_goes_over_what_the_first_left(root):
    with pytest.raises(Killed):
        retention.delete(root, 10, remove=kill_in_the_middle)
    manifest.folder_of(root, 10).mkdir()
    retention.delete(root, 10)
    assert [path.name for path in root.iterdir()] == ["step-00000020"]


def test_what_is_set_aside_is_kept_and_is_no_checkpoint(root):
    aside = retention.set_aside(root, 20, "left-by-attempt-2")
    assert manifest.steps(root) == [10]
    retention.clear(root)
    assert len(list(aside.iterdir())) == 3
