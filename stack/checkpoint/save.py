"""Saves the state of all ranks as one checkpoint, while training waits or in the background."""

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
from stack.checkpoint.staging import Staging
from stack.checkpoint.storage import SaveSlices, Slice, Writer, slices_of
from stack.config.schema import Checkpoint
from stack.disk import size, sync, write_whole
from stack.errors import CheckpointError
from stack.parallel.rank_engine import RankEngine

#: The run ends when so many saves in a row have failed, because it could not be resumed from later than the last good
#: one.
_FAILURES = 3


@dataclass(frozen=True)
class Saved:
    """The time that a save took, in seconds. A field is None where the value is not known yet or was returned before.

    stall_s: time that training waited for this save.
    write_s: time from the beginning of a save until the checkpoint is whole. In the background this is known only
        later, and then belongs to the save before.
    """

    stall_s: float | None
    write_s: float | None


class Saver:
    """Saves a run's state into `root`. Every method except `finished` is collective over all ranks."""

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
            root: folder of the run's checkpoints.
            engine: this rank's engine.
            cfg: the section `checkpoint` of the config.
            about: the fields of `Manifest` that stay the same in a run: course, plan, versions.
            shapes: Hugging Face name -> shape, for all parameters of the model.
            tell: called with lines for the user.
            phase: called with (name, step) of each phase of a save; tests inject faults there.
        """
        self._root, self._engine, self._cfg, self._about, self._shapes = root, engine, cfg, about, shapes
        self._tell, self._phase = tell, phase
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: tuple[int, Future[float]] | None = None
        self._staging = Staging()
        self._failures = 0
        self._told: Future[float] | None = None
        """The failed save that was reported to the user last."""

    def save(self, step: int, state: dict[str, Any], *, heldout_loss: float | None, last: bool = False) -> Saved:
        """Saves the state after `step`. At most one save runs in the background; the next save waits for it.

        Args:
            step: finished steps.
            state: `TrainState.saved`.
            heldout_loss: held-out loss after this step in nats, or None.
            last: whether the run ends with this save. It is then not in the background, and must not fail.

        Raises:
            CheckpointError: the third save in a row failed, or the last one of the run.
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
        """The time of a save in the background that has succeeded since the last call, else None. Reports a failed save
        to the user, once; the next save counts the failure. Not collective."""
        if self._running is None or not self._running[1].done():
            return None
        step, future = self._running
        if error := future.exception():
            self._tell_failure(step, future, error)
            return None
        self._running, self._failures = None, 0
        return Saved(None, future.result())

    def wait(self, *, must: bool = False) -> float | None:
        """Waits for the save in the background, if there is one, and returns the seconds that it took.

        Args:
            must: whether a failure of this save ends the run.

        Raises:
            CheckpointError: the save failed, and `must` is set or it was the third in a row to fail.
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
        """Waits for the save in the background and stops the thread."""
        self.wait()
        self._pool.shutdown()

    def _failed(self, step: int, future: "Future[float]", error: BaseException, must: bool) -> None:
        self._failures += 1
        if must or self._failures == _FAILURES:
            row = "the last save" if must else f"the {_FAILURES}rd failure in a row"
            raise CheckpointError(
                f"{_failure(step, error)}; this was {row}: make room, or set checkpoint.path to another disk"
            )
        self._tell_failure(step, future, error)

    def _tell_failure(self, step: int, future: "Future[float]", error: BaseException) -> None:
        """Reports a failed save to the user, once for each save."""
        if self._told is not future:
            self._told = future
            self._tell(f"{_failure(step, error)}; training continues, and the earlier checkpoints are whole")

    def _slices(self, *, copy: bool) -> dict[str, Slice]:
        """The slices that this rank saves: the live tensors, or with `copy` copies of them in host memory."""
        found: dict[str, Slice] = {}
        copy = copy or self._engine.in_files
        if self._engine.mesh.device.type == "cuda":
            # The update may still run on another stream than the one that copies.
            torch.cuda.synchronize()
        for group in range(self._engine.groups):
            with self._engine.parts(group, load=False) as parts:
                slices = slices_of(parts)
                if copy:
                    self._staging.copy(group, slices)
                found |= slices
        if copy and self._engine.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        return found

    def _write(self, facts: dict[str, Any], slices: dict[str, Slice], started: float) -> float:
        """Writes a checkpoint and returns the seconds since `started`. Runs on the thread of the pool. If one rank
        fails, all ranks raise `CheckpointException`."""
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
                # Every rank has stopped writing, so the incomplete folder can be removed.
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return time.perf_counter() - started

    def _prepare(self, folder: Path, need: int) -> None:
        """Runs on rank 0 before the ranks write: checks that `need` bytes are free, and makes the folder. Raises
        `OSError` if there is too little room."""
        # Parents are made only for checkpoint.path, so that a run directory that was removed is not made again.
        self._root.mkdir(parents=self._cfg.path is not None, exist_ok=True)
        retention.clear(self._root)
        free = shutil.disk_usage(self._root).free
        if need > free:
            raise OSError(f"{size(need)} are needed in {self._root}, and {size(free)} are free")
        folder.mkdir()

    def _commit(
        self, folder: Path, facts: dict[str, Any], files: list[File], places: dict[str, list[tuple[int, int, int]]]
    ) -> None:
        """Runs on rank 0 after every rank has written: writes the manifest, renames the folder, and deletes checkpoints
        that are no longer kept.

        Args:
            folder: the temporary folder.
            facts: fields of `Manifest`.
            files: the files of all ranks.
            places: name of a parameter -> its slices, as in `Parameter.slices`.
        """
        parameters = {name: Parameter(shape, tuple(sorted(places[name]))) for name, shape in self._shapes.items()}
        manifest = Manifest(**facts, time=time.time(), files=tuple(files), parameters=parameters)
        write_whole(folder / manifests.MANIFEST, manifest.to_json(), durable=True)
        self._phase("save.before_rename", manifest.step)
        target = manifests.folder_of(self._root, manifest.step)
        if target.exists():
            # The old checkpoint gets a name that `retention.clear` does not remove, so that a crash between the two
            # renames does not lose both checkpoints of this step.
            aside = retention.set_aside(self._root, manifest.step, f"replaced-{secrets.token_hex(4)}")
            self._tell(f"there was a checkpoint of step {manifest.step} already, which is set aside: {aside}")
        folder.rename(target)
        sync(self._root)
        self._retain()

    def _retain(self) -> None:
        """Deletes the checkpoints that are no longer kept. A failure is reported to the user and does not count as a
        failed save."""
        saved: dict[int, float | None] = {}
        try:
            for step in manifests.steps(self._root):
                saved[step] = manifests.read(manifests.folder_of(self._root, step)).heldout_loss
            for step in retention.superfluous(saved, self._cfg):
                retention.delete(self._root, step)
        except (CheckpointError, OSError) as error:
            self._tell(f"old checkpoints could not be deleted: {error}")


def _failure(step: int, error: BaseException) -> str:
    return f"checkpoint of step {step} could not be saved: {reason(error)}"
