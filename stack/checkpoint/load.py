"""Loading: the newest checkpoint that every rank finds whole, into whatever layout the run has now."""

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
    """The checkpoint to go on from, or None where there has never been one. Collective over all ranks.

    Every rank sees that the files are there, and reads its share of them in full.

    Args:
        step: of the checkpoint, or `auto` for the newest one that is whole.
        tell: takes a line for the user on each one that is passed over.
        check: raises CheckpointError for a manifest that is as damaged as one that cannot be read.

    Raises:
        CheckpointError: there are checkpoints, and none that may be used is whole.
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
        tell(f"checkpoint of step {candidate} is passed over: {why}")
    if candidates:
        raise CheckpointError(f"none of {len(candidates)} checkpoints in {root} is whole, the last because {why}")
    return None


def _verified(folder: Path, mesh: Mesh, check: Callable[[Manifest], object]) -> tuple[Manifest | None, list[str]]:
    """The manifest, if no rank finds a fault; else None and the faults of all ranks."""
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
    """Reads what this rank holds of a checkpoint that `check_same_model` has accepted, and takes it over. Collective.

    Args:
        weights_only: leave the optimizer as it is, to evaluate.

    Raises:
        CheckpointError: on every rank, where one could not read.
    """
    fault = None
    try:
        for group in range(engine.groups):
            with engine.parts(group, load=True) as parts:
                slices = {
                    key: part for key, part in slices_of(parts).items() if not weights_only or key.startswith("master/")
                }
                with warnings.catch_warnings():
                    # Every rank reads for itself, and DCP takes that for a mistake.
                    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                    dcp.load(
                        slices, storage_reader=Reader(found.folder, found.manifest), planner=LoadSlices(), no_dist=True
                    )
    # Also CheckpointException, which is no Exception.
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        fault = f"{found.folder} could not be read: {reason(error)}"
    faults = [other for other in messages.gather(fault, engine.mesh.disk_group) if other]
    if faults:
        raise CheckpointError(faults[0])
    engine.loaded()
    if not weights_only:
        engine.updates, engine.scaling = found.manifest.updates, found.manifest.scaling


def reason(error: BaseException) -> str:
    """One line on what went wrong, and on which rank where DCP says so."""
    told = str(error)
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        told = f"rank {rank}: {cause}"
    return " ".join(told.split())
