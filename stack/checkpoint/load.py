"""Finds the newest checkpoint that is whole on every rank, and loads it into the present layout of the run."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from stack.checkpoint import manifest as manifests
from stack.checkpoint.files import check_file
from stack.checkpoint.manifest import Manifest
from stack.checkpoint.storage import LoadSlices, Reader, slices_of
from stack.errors import CheckpointError
from stack.parallel import messages
from stack.parallel.mesh import Mesh
from stack.parallel.rank_engine import RankEngine


@dataclass(frozen=True)
class Found:
    """A checkpoint that all ranks have verified."""

    folder: Path
    manifest: Manifest


def find(
    root: Path,
    step: int | str,
    mesh: Mesh,
    *,
    tell: Callable[[str], None],
    check: Callable[[Manifest], object] = lambda _: None,
) -> Found | None:
    """The checkpoint to resume from, or None where there is none at all. Collective over all ranks.

    Every rank checks names and sizes of all files, and reads its share of the files in full.

    Args:
        root: folder of the run's checkpoints.
        step: step of the checkpoint, or `auto` for the newest one that is whole.
        mesh: this rank's process groups.
        tell: called with a line for the user for each checkpoint that is not whole.
        check: an additional check of the manifest, which raises CheckpointError where it finds damage.

    Raises:
        CheckpointError: there is no checkpoint of `step`, or no checkpoint that may be used is whole.
    """
    candidates: list[int] = messages.broadcast(
        manifests.steps(root)[::-1] if mesh.rank == 0 else None, group=mesh.disk_group
    )
    manifests.check_step(step, candidates, where=root)
    if step != "auto":
        candidates = [int(step)]
    why = ""
    for candidate in candidates:
        folder = manifests.folder_of(root, candidate)
        manifest, faults = _verified(folder, mesh, check)
        if manifest is not None:
            return Found(folder, manifest)
        why = faults[0]
        tell(f"checkpoint of step {candidate} is skipped: {why}")
    if candidates:
        raise CheckpointError(f"none of {len(candidates)} checkpoints in {root} is whole; the oldest: {why}")
    return None


def _verified(folder: Path, mesh: Mesh, check: Callable[[Manifest], object]) -> tuple[Manifest | None, list[str]]:
    """(manifest, no faults) if no rank finds a fault, else (None, the faults of all ranks). Collective."""
    manifest, fault = None, None
    try:
        manifest = manifests.read(folder)
        check(manifest)
        for file in manifest.files[mesh.rank :: mesh.world_size]:
            check_file(folder, manifest, file)
    except (CheckpointError, OSError) as error:
        fault = str(error)
    faults = [found for found in messages.gather(fault, mesh.disk_group) if found]
    return (None if faults else manifest), faults


def load(found: Found, engine: RankEngine, *, weights_only: bool = False) -> None:
    """Reads this rank's parts of a checkpoint into the engine. `check_same_model` must have accepted the checkpoint.
    Collective.

    Args:
        found: the checkpoint.
        engine: this rank's engine.
        weights_only: do not load the optimizer's state, for an evaluation.

    Raises:
        CheckpointError: a rank could not read its parts. Raised on every rank.
    """
    fault = None
    try:
        for group in range(engine.groups):
            with engine.parts(group, load=True) as parts:
                slices = {
                    key: part for key, part in slices_of(parts).items() if not weights_only or key.startswith("master/")
                }
                with warnings.catch_warnings():
                    # Every rank loads on its own (no_dist=True), and DCP warns about that.
                    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                    dcp.load(
                        slices, storage_reader=Reader(found.folder, found.manifest), planner=LoadSlices(), no_dist=True
                    )
    # CheckpointException is named because it does not derive from Exception.
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        fault = f"{found.folder} could not be read: {reason(error)}"
    faults = [other for other in messages.gather(fault, engine.mesh.disk_group) if other]
    if faults:
        raise CheckpointError(faults[0])
    engine.loaded()
    if not weights_only:
        engine.updates, engine.scaling = found.manifest.updates, found.manifest.scaling


def reason(error: BaseException) -> str:
    """The message of an error on one line; for an error of DCP with the rank that failed."""
    told = str(error)
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        told = f"rank {rank}: {cause}"
    return " ".join(told.split())
