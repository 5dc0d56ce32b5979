"""Whether the checkpoints of a run can be written where they are to go: looked at before the run starts, because the
first save may be hours away."""

import math
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from stack.checkpoint import manifest, retention
from stack.config.schema import Config
from stack.disk import size, write_whole
from stack.errors import ConfigError
from stack.plan.layout import Plan
from stack.plan.policies import state_names


def check(cfg: Config, plan: Plan, run: Path | None = None, *, tell: Callable[[str], object] = print) -> None:
    """Writes a file to `checkpoint.path`, and compares the free space there, or at `run.root`, with the checkpoints.

    Args:
        run: of a run that goes on: its directory, which the caller has locked. What an interrupted save has left there
            is removed, since the next save would do so.
        tell: takes a line for the user where the disk has room for a checkpoint, and not for as many as will be kept.

    Raises:
        ConfigError: the folder cannot be written, or has no room for a single checkpoint.
    """
    if not cfg.checkpoint.every:
        return
    path = cfg.checkpoint.path
    key, folder = ("checkpoint.path", Path(path)) if path else ("run.root", run or Path(cfg.run.root).expanduser())
    there = []
    try:
        if path:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{secrets.token_hex(4)}"
            write_whole(probe, "x")
            probe.unlink()
        if run:
            root = manifest.root_of(path, run)
            retention.clear(root)
            there = manifest.steps(root)
        free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    except OSError as error:
        raise ConfigError(
            f"{key}={folder} cannot be written ({error.strerror}); use a folder that can, or checkpoint.every=0"
        ) from error
    need = 4 * len(state_names(cfg)) * plan.shape.total_params
    if need > free:
        raise ConfigError(
            f"{key}={folder} has {size(free)} free, and a checkpoint takes {size(need)}; make room, set "
            "checkpoint.path to another disk, or checkpoint.every=0 for a run without checkpoints"
        )
    if line := _too_few(cfg, free // need, there):
        tell(f"{size(free)} free in {folder}, and a checkpoint takes {size(need)}: {line}")


def _too_few(cfg: Config, fit: int, there: list[int]) -> str | None:
    """What will happen on a disk that takes `fit` more checkpoints than are `there`, if that is too few."""
    keep, steps = cfg.checkpoint, cfg.train.steps
    others = keep.keep_best + (steps // keep.keep_every if keep.keep_every else 0)
    # One more while it is being written, because an old one goes only when the new one is whole.
    most = min(keep.keep_last + others + 1, math.ceil(steps / keep.every))
    if most <= len(there) + fit:
        return None
    last = len(there) + fit - others - 1
    advice = (
        f"checkpoint.keep_last={last} fits" if 1 <= last < keep.keep_last else "set checkpoint.path to another disk"
    )
    return f"there will be up to {most} at a time, and saving will fail when the disk is full; {advice}"
