"""Checks before a run starts that its checkpoints can be written; the first save may come hours later."""

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
    """Writes a test file to `checkpoint.path`, and compares the free space there, or at `run.root`, with the size of
    the checkpoints.

    Args:
        cfg: the config.
        plan: the layout.
        run: for a resumed run its directory, which the caller has locked. Remains of an interrupted save are removed
            there first, as the next save would do.
        tell: called with a line for the user if the disk has room for a checkpoint, but not for as many as will be
            kept.

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
            f"{key}={folder} cannot be written ({error.strerror}); use a writable folder, or checkpoint.every=0"
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
    """A clause for the user if the disk is too small for the checkpoints that will be kept, else None.

    Args:
        cfg: the config.
        fit: number of further checkpoints for which the disk has room.
        there: steps of the existing checkpoints.
    """
    keep, steps = cfg.checkpoint, cfg.train.steps
    others = keep.keep_best + (steps // keep.keep_every if keep.keep_every else 0)
    # One more than are kept, because an old checkpoint is deleted only after the new one is whole.
    most = min(keep.keep_last + others + 1, math.ceil(steps / keep.every))
    if most <= len(there) + fit:
        return None
    last = len(there) + fit - others - 1
    advice = (
        f"checkpoint.keep_last={last} fits" if 1 <= last < keep.keep_last else "set checkpoint.path to another disk"
    )
    return f"there will be up to {most} at a time, and saving will fail when the disk is full; {advice}"
