"""Saving: the state of all ranks as one checkpoint, at once or in the background; a failed save loses nothing."""

import secrets
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from stack.checkpoint import manifest as manifests
from stack.checkpoint import retention
from stack.checkpoint.load import reason
from stack.checkpoint.manifest import File, Manifest, Parameter
from stack.checkpoint.storage import SaveSlices, Slice, Writer, slices_of
from stack.config.schema import Checkpoint
from stack.disk import size, sync, write_whole
from stack.errors import CheckpointError
from stack.parallel.rank_engine import RankEngine

#: Saves that may fail one after another before the run ends: training on without a way back is no help.
_FAILURES = 3


@dataclass(frozen=True)
class Saved:
    """What saving has cost, in seconds; None where it is not known yet, or was known before.

    stall_s: how long training waited for this save.
    write_s: from the beginning of a save to the whole checkpoint.
    """

    stall_s: float | None
    write_s: float | None


class Saver:
    """Saves a run's state into `root`. Every method is collective over all ranks, but for `finished`."""

    def __init__(
        self,
        root: Path,
        engine: RankEngine,
        cfg: Checkpoint,
        *,
        about: dict[str, Any],
        shapes: dict[str, tuple[int, ...]],
        tell: Callable[[str], None],
        phase: Callable[[str, int], None],
    ):
        """
        Args:
            about: fields of `Manifest` that no step changes: course, plan, versions.
            shapes: of all parameters of the model, by Hugging Face name.
            tell: takes a line for the user.
            phase: called with the names and the step of the moments at which tests break a save.
        """
        self._root, self._engine, self._cfg, self._about, self._shapes = root, engine, cfg, about, shapes
        self._tell, self._phase = tell, phase
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: tuple[int, Future[float]] | None = None
        self._staged: dict[str, torch.Tensor] = {}
        self._failures = 0
        self._told: Future[float] | None = None
        """The failed save that the user knows of."""

    def save(self, step: int, state: dict[str, Any], *, heldout_loss: float | None, last: bool = False) -> Saved:
        """Saves the state after `step`. In the background there is one save at most; the next one waits for it.

        Args:
            state: what the training loop must remember, as JSON.
            last: the run ends with it, so it is waited for and must not fail.

        Raises:
            CheckpointError: this was the third save in a row to fail, or the last one.
        """
        started = time.perf_counter()
        before = self.wait()
        background = self._cfg.async_save and not last
        self._phase("save.stage", step)
        slices = self._slices(copy=background)
        facts = {
            **self._about,
            "step": step,
            "state": state,
            "heldout_loss": heldout_loss,
            "updates": self._engine.updates,
            "scaling": self._engine.scaling,
            "states": self._engine.state_names,
        }
        self._running = step, self._pool.submit(self._write, facts, slices, started)
        write_s = before if background else self.wait(must=last)
        return Saved(time.perf_counter() - started, write_s)

    def finished(self) -> Saved | None:
        """A save in the background that has ended well since this was asked last. Tells of one that has failed, which
        the next save counts. Not collective."""
        if self._running is None or not self._running[1].done():
            return None
        step, future = self._running
        if error := future.exception():
            self._tell_failure(step, future, error)
            return None
        self._running, self._failures = None, 0
        return Saved(None, future.result())

    def wait(self, *, must: bool = False) -> float | None:
        """Waits for the save in the background, if there is one; returns the seconds it took.

        Raises:
            CheckpointError: it was the third in a row to fail, or `must` not.
        """
        if self._running is None:
            return None
        (step, future), self._running = self._running, None
        try:
            write_s = future.result()
        except (CheckpointException, RuntimeError, OSError) as error:
            self._failed(step, future, error, must)
            return None
        self._failures = 0
        return write_s

    def close(self) -> None:
        """Waits for what is being written."""
        self.wait()
        self._pool.shutdown()

    def _failed(self, step: int, future: "Future[float]", error: BaseException, must: bool) -> None:
        self._failures += 1
        if must or self._failures == _FAILURES:
            row = "the last one" if must else f"the {_FAILURES}rd in a row"
            raise CheckpointError(
                f"{_failure(step, error)}; it was {row}: make room, or set checkpoint.path to another disk"
            )
        self._tell_failure(step, future, error)

    def _tell_failure(self, step: int, future: "Future[float]", error: BaseException) -> None:
        """Once for each save."""
        if self._told is not future:
            self._told = future
            self._tell(f"{_failure(step, error)}; training goes on, and the checkpoints before it are whole")

    def _slices(self, *, copy: bool) -> dict[str, Slice]:
        """What this rank saves: the live tensors, or copies of them in host memory."""
        found: dict[str, Slice] = {}
        copy = copy or self._engine.in_files
        if self._engine.mesh.device.type == "cuda":
            # The update may still be running on another stream than the copies.
            torch.cuda.synchronize()
        for group in range(self._engine.groups):
            with self._engine.parts(group, load=False) as parts:
                slices = slices_of(parts)
                if copy:
                    for key, part in slices.items():
                        part.tensor = self._stage(key, part.tensor)
                found |= slices
        if copy and self._engine.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        return found

    def _stage(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in a host buffer that is kept from save to save: pinned memory is slow to get."""
        if key not in self._staged:
            self._staged[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self._staged[key].copy_(tensor, non_blocking=True)

    def _write(self, facts: dict[str, Any], slices: dict[str, Slice], started: float) -> float:
        """On the thread of the pool. Raises on all ranks, if on one."""
        step = facts["step"]
        folder = self._root / f"{retention.UNFINISHED}saving-{manifests.folder_of(self._root, step).name}"
        writer = Writer(
            folder,
            self._engine.mesh.rank,
            prepare=lambda need: self._prepare(folder, need),
            commit=lambda files, places: self._commit(folder, facts, files, places),
            phase=lambda name: self._phase(name, step),
        )
        try:
            dcp.save(slices, storage_writer=writer, planner=SaveSlices(), process_group=self._engine.mesh.disk_group)
        except CheckpointException:
            if self._engine.mesh.rank == 0:
                # Every rank has stopped writing: what there is only takes room.
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return time.perf_counter() - started

    def _prepare(self, folder: Path, need: int) -> None:
        """On rank 0: room for `need` bytes, and an empty folder."""
        # A run directory that was removed is not made again.
        self._root.mkdir(parents=self._cfg.path is not None, exist_ok=True)
        retention.clear(self._root)
        free = shutil.disk_usage(self._root).free
        if need > free:
            raise OSError(f"{size(need)} are needed in {self._root}, and {size(free)} are free")
        folder.mkdir()

    def _commit(
        self, folder: Path, facts: dict[str, Any], files: list[File], places: dict[str, list[tuple[int, int, int]]]
    ) -> None:
        """On rank 0, when every rank has written: the manifest, the name, and the end of what is no longer kept."""
        parameters = {name: Parameter(shape, tuple(sorted(places[name]))) for name, shape in self._shapes.items()}
        manifest = Manifest(**facts, time=time.time(), files=tuple(files), parameters=parameters)
        write_whole(folder / manifests.MANIFEST, manifest.to_json(), durable=True)
        self._phase("save.before_rename", manifest.step)
        target = manifests.folder_of(self._root, manifest.step)
        if target.exists():
            # Under a name that `retention.clear` leaves alone: a crash here must not cost both checkpoints of the step.
            aside = retention.set_aside(self._root, manifest.step, f"replaced-{secrets.token_hex(4)}")
            self._tell(f"there was a checkpoint of step {manifest.step} already; it is set aside: {aside}")
        folder.rename(target)
        sync(self._root)
        self._retain()

    def _retain(self) -> None:
        """The new checkpoint is there, whatever becomes of the old ones."""
        saved: dict[int, float | None] = {}
        try:
            for step in manifests.steps(self._root):
                saved[step] = manifests.read(manifests.folder_of(self._root, step)).heldout_loss
            for step in retention.superfluous(saved, self._cfg):
                retention.delete(self._root, step)
        except (CheckpointError, OSError) as error:
            self._tell(f"older checkpoints stay as they are: {error}")


def _failure(step: int, error: BaseException) -> str:
    return f"checkpoint of step {step} could not be saved: {reason(error)}"
