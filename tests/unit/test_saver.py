"""Failed saves, saves of a step that has a checkpoint already, and the check of free space before a run."""

import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from stack.checkpoint import manifest as manifests
from stack.checkpoint import retention, room
from stack.checkpoint.save import Saver
from stack.config.compose import compose
from stack.config.schema import Checkpoint
from stack.errors import CheckpointError, ConfigError
from stack.plan.layout import make_plan
from tests.helpers.crafted import whole_checkpoint


@pytest.fixture
def saver(tmp_path) -> Any:
    """A Saver without an engine and process groups, for the parts that rank 0 does alone."""
    saver = object.__new__(Saver)
    saver._root, saver._cfg, saver._shapes = tmp_path / "checkpoints", Checkpoint(), {}
    saver.told = []  # type: ignore[attr-defined]
    saver._tell = saver.told.append  # type: ignore[attr-defined]
    saver._phase = lambda *_: None
    saver._running, saver._failures, saver._told = None, 0, None
    return saver


def failed() -> "Future[float]":
    future: Future[float] = Future()
    future.set_exception(OSError("no room"))
    return future


def test_a_save_that_failed_in_the_background_is_told_at_once_and_counted_at_the_next(saver):
    for step in (500, 1000):
        saver._running = step, failed()
        assert saver.finished() is None
        assert saver.finished() is None
        assert saver.told == [
            f"checkpoint of step {step} could not be saved: no room; training continues, and the earlier checkpoints "
            "are whole"
        ]
        saver.wait()
        assert saver._failures == step // 500
        saver.told.clear()
    saver._running = 1500, failed()
    saver.finished()
    with pytest.raises(CheckpointError, match="step 1500 could not be saved: no room; this was the 3rd failure"):
        saver.wait()


def commit(saver: Any, step: int) -> None:
    """Does rank 0's part of a save of `step`."""
    made = whole_checkpoint(saver._root / "made", step)
    folder = saver._root / f"{retention.UNFINISHED}saving-{made.name}"
    made.rename(folder)
    manifest = manifests.Manifest.from_json((folder / manifests.MANIFEST).read_bytes())
    (folder / manifests.MANIFEST).unlink()
    names = ("step", "state", "updates", "scaling", "states", "course", "heldout_loss", "plan", "versions")
    saver._shapes = {name: parameter.shape for name, parameter in manifest.parameters.items()}
    places = {name: list(parameter.slices) for name, parameter in manifest.parameters.items()}
    saver._commit(folder, {name: getattr(manifest, name) for name in names}, list(manifest.files), places)


def test_a_kill_at_any_moment_of_a_second_save_of_a_step_leaves_one_of_them(saver, monkeypatch):
    whole_checkpoint(saver._root, 4)
    rename, count = Path.rename, iter(range(10))

    def killed(path: Path, target: Path) -> Path:
        if next(count) == 1:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            commit(saver, 4)
    retention.clear(saver._root)
    [kept] = saver._root.glob("step-00000004*")
    kept.rename(manifests.folder_of(saver._root, 4))
    assert manifests.read(manifests.folder_of(saver._root, 4)).step == 4
    shutil.rmtree(saver._root / "made")
    commit(saver, 4)
    assert manifests.read(manifests.folder_of(saver._root, 4)).step == 4
    assert "already, which is set aside" in saver.told[-1]


def config(tmp_path: Path, *overrides: str, every: int = 10) -> tuple[Any, Any]:
    cfg = compose([f"run.root={tmp_path / 'runs'}", "train.steps=1000", f"checkpoint.every={every}", *overrides])
    return cfg, make_plan(cfg)


def line_on(cfg: Any, plan: Any, run: Path | None = None) -> str:
    """The line for the user; empty where there is enough room."""
    told: list[str] = []
    room.check(cfg, plan, run, tell=told.append)
    return "".join(told)


def with_room_for(monkeypatch: pytest.MonkeyPatch, plan: Any, checkpoints: float) -> None:
    free = int(12 * plan.shape.total_params * checkpoints)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", ["/dev/null/x", "/proc/x"])
def test_a_place_that_takes_no_file_is_refused(tmp_path, path):
    with pytest.raises(ConfigError, match=rf"checkpoint.path={path} cannot be written \(.*\); use a writable folder"):
        room.check(*config(tmp_path, f"checkpoint.path={path}"))
    assert line_on(*config(tmp_path, f"checkpoint.path={path}", every=0)) == ""


@pytest.mark.parametrize("path", ["", "/elsewhere"])
def test_a_disk_without_room_for_one_is_refused_with_numbers(tmp_path, monkeypatch, path):
    overrides = [f"checkpoint.path={tmp_path}{path}"] if path else []
    cfg, plan = config(tmp_path, *overrides)
    with_room_for(monkeypatch, plan, 0.5)
    key = "checkpoint.path" if path else "run.root"
    with pytest.raises(ConfigError, match=rf"{key}=\S+ has \d+\.\d MB free, and a checkpoint takes \d+\.\d MB; make"):
        room.check(cfg, plan)
    with_room_for(monkeypatch, plan, 100)
    assert line_on(cfg, plan) == ""
    assert not list(tmp_path.rglob(".probe*"))


def test_a_disk_with_room_for_too_few_is_told_and_what_it_says_works(tmp_path, monkeypatch):
    cfg, plan = config(tmp_path, "checkpoint.keep_last=5")
    with_room_for(monkeypatch, plan, 3.5)
    line = line_on(cfg, plan)
    assert "there will be up to 6 at a time" in line
    assert line.endswith("checkpoint.keep_last=2 fits")
    assert line_on(*config(tmp_path, "checkpoint.keep_last=2")) == ""
    with_room_for(monkeypatch, plan, 1.5)
    assert line_on(cfg, plan).endswith("set checkpoint.path to another disk")


def test_on_a_run_that_goes_on_its_checkpoints_count(tmp_path, monkeypatch):
    cfg, plan = config(tmp_path, "checkpoint.keep_last=2")
    run = tmp_path / "runs" / "name" / "id"
    for step in (10, 20):
        whole_checkpoint(run / "checkpoints", step)
    left = run / "checkpoints" / ".saving-step-00000030"
    left.mkdir()
    with_room_for(monkeypatch, plan, 1.5)
    assert line_on(cfg, plan, run) == ""
    assert not left.exists()
