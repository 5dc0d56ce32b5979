"""Which checkpoints go, and going in an order that never leaves half of one under a checkpoint's name."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from stack.checkpoint.manifest import folder_of
from stack.config.schema import Checkpoint
from stack.disk import sync
from stack.errors import CheckpointError

#: Begins the names of folders that are being made or deleted.
UNFINISHED = "."


def superfluous(saved: Mapping[int, float | None], keep: Checkpoint) -> list[int]:
    """Steps of the checkpoints that no rule keeps, the oldest first.

    Args:
        saved: held-out loss of each checkpoint by its step, None where it was not evaluated.
        keep: its `keep_last`, `keep_every` and `keep_best`; of equal losses the earlier one is better.
    """
    kept = set(sorted(saved)[-keep.keep_last :])
    if keep.keep_every:
        kept |= {step for step in saved if step % keep.keep_every == 0}
    losses = sorted((loss, step) for step, loss in saved.items() if loss is not None)
    kept |= {step for _, step in losses[: keep.keep_best]}
    return sorted(set(saved) - kept)


def delete(
    root: Path,
    step: int,
    *,
    rename: Callable[[Path, Path], object] = os.rename,
    remove: Callable[[Path], object] = shutil.rmtree,
) -> None:
    """Deletes a checkpoint: invalid at once, by another name, then file by file.

    Args:
        rename, remove: what does it; tests break them.

    Raises:
        OSError: it could not; what is left is no checkpoint, or a whole one.
    """
    doomed = root / f"{UNFINISHED}deleting-{folder_of(root, step).name}"
    if doomed.exists():
        remove(doomed)
    rename(folder_of(root, step), doomed)
    sync(root)
    remove(doomed)


def clear(root: Path, *, remove: Callable[[Path], object] = shutil.rmtree) -> None:
    """Removes what a save or a deletion that was interrupted has left."""
    for left in root.glob(f"{UNFINISHED}*step-*"):
        remove(left)


def set_aside(root: Path, step: int, name: str) -> Path:
    """Takes a checkpoint out of the row without deleting it, as `<its name>.<name>`; returns its new path.

    Raises:
        CheckpointError: it cannot be renamed.
    """
    aside = folder_of(root, step).with_suffix(f".{name}")
    try:
        os.rename(folder_of(root, step), aside)
        sync(root)
    except OSError as error:
        raise CheckpointError(f"{folder_of(root, step)} cannot be renamed ({error.strerror}), and must be") from error
    return aside
