"""Chooses the checkpoints to delete, and deletes them so that no incomplete folder has a checkpoint's name."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from stack.checkpoint.manifest import folder_of
from stack.config.schema import Checkpoint
from stack.disk import sync
from stack.errors import CheckpointError

#: First character in the names of folders that are being written or deleted.
UNFINISHED = "."


def superfluous(saved: Mapping[int, float | None], keep: Checkpoint) -> list[int]:
    """Steps of the checkpoints that no rule keeps, the oldest first.

    Args:
        saved: step of each checkpoint -> its held-out loss, or None where it was not evaluated.
        keep: the rules `keep_last`, `keep_every` and `keep_best`; of equal losses the earlier step counts as better.
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
    """Deletes a checkpoint: renames its folder, so that it no longer counts as a checkpoint, then removes the files.

    Args:
        root: folder of the checkpoints.
        step: step of the checkpoint.
        rename, remove: the functions that rename and remove a folder; tests replace them by failing ones.

    Raises:
        OSError: a call failed. The folder is then either a whole checkpoint or renamed.
    """
    doomed = root / f"{UNFINISHED}deleting-{folder_of(root, step).name}"
    if doomed.exists():
        remove(doomed)
    rename(folder_of(root, step), doomed)
    sync(root)
    remove(doomed)


def clear(root: Path, *, remove: Callable[[Path], object] = shutil.rmtree) -> None:
    """Removes the remains of interrupted saves and deletions. Raises `OSError` where that fails."""
    for left in root.glob(f"{UNFINISHED}*step-*"):
        remove(left)


def set_aside(root: Path, step: int, name: str) -> Path:
    """Renames a checkpoint to `<its name>.<name>`, so that it no longer counts as a checkpoint, and returns its new
    path.

    Raises:
        CheckpointError: it cannot be renamed.
    """
    aside = folder_of(root, step).with_suffix(f".{name}")
    try:
        os.rename(folder_of(root, step), aside)
        sync(root)
    except OSError as error:
        raise CheckpointError(
            f"{folder_of(root, step)} must be set aside and cannot be renamed ({error.strerror})"
        ) from error
    return aside
