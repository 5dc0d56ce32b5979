"""Where a run begins: at step 0, or at the newest checkpoint that is whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from stack.checkpoint import load as loading
from stack.checkpoint import manifest, retention
from stack.checkpoint.save import Saver
from stack.config.schema import Config
from stack.errors import CheckpointError, NumericsError
from stack.health.faults import Faults
from stack.models.build import parameter_shapes
from stack.parallel.engine import Engine
from stack.parallel.mesh import Mesh
from stack.plan.layout import Plan
from stack.plan.policies import state_names
from stack.train import rundir
from stack.train.inputs import course
from stack.train.rundir import RunDir
from stack.train.state import TrainState


class Restart:
    """Finds what to go on from, and gives the parts of a run that depend on it. Collective over all ranks."""

    def __init__(self, cfg: Config, plan: Plan, run: RunDir, mesh: Mesh):
        """
        Raises:
            CheckpointError: there are checkpoints and none is whole, or the one to go on from is of another model or
                of another course of training; no parameter was touched.
        """
        self._cfg, self._plan, self._run, self._mesh = cfg, plan, run, mesh
        self._root = manifest.root_of(cfg.checkpoint.path, run.path)
        self._shapes = parameter_shapes(cfg)
        self._course = course(cfg, run.corpus)
        self._told: list[str] = []
        self._found = loading.find(
            self._root,
            cfg.checkpoint.step,
            mesh,
            tell=self._told.append,
            check=lambda found: TrainState.restored(found.state, attempt=run.attempt),
        )
        if self._found is not None:
            manifest.check_same_model(self._found.manifest, self._shapes, where=self._found.folder)
            states = state_names(cfg)
            manifest.check_same_course(self._found.manifest, cfg, self._course, states, where=self._found.folder)

    def engine(self) -> Engine:
        """The engine; its weights are drawn or read only where no checkpoint brings them."""
        return Engine(self._cfg, self._plan, self._mesh, empty=self._found is not None)

    def state(self, engine: Engine, *, tell: Callable[[str], None]) -> TrainState:
        """The state of training, after the engine's has been loaded. Checkpoints of later steps, which belong to a
        course that was left, are set aside."""
        for line in self._told:
            tell(line)
        if self._found is None:
            if self._run.attempt > 1:
                tell(f"no checkpoint in {self._root}: the run begins again with step 1")
            return TrainState(attempt=self._run.attempt)
        loading.load(self._found, engine.rank_engine)
        self._set_aside(tell)
        tell(f"resumed from {self._found.folder}")
        state = TrainState.restored(self._found.manifest.state, attempt=self._run.attempt)
        return replace(state, sequences=0) if self._has_other_data(self._found) else state

    def _set_aside(self, tell: Callable[[str], None]) -> None:
        assert self._found is not None
        if self._mesh.rank == 0:
            for later in (step for step in manifest.steps(self._root) if step > self._found.manifest.step):
                tell(f"set aside: {retention.set_aside(self._root, later, f'left-by-attempt-{self._run.attempt}')}")

    def _has_other_data(self, found: loading.Found) -> bool:
        names = [name for name in self._course if name.startswith(("data.", "run."))]
        return any(self._course[name] != found.manifest.course.get(name) for name in names)

    def before(self, state: TrainState) -> int:
        """Sequences ahead of global batch 0, as if the batch had always had its present size."""
        return state.sequences - state.step * self._cfg.batch.global_size

    @contextmanager
    def saver(self, engine: Engine, *, tell: Callable[[str], None]) -> Iterator[Saver]:
        """Saves this run's checkpoints; what is being written when training ends is waited for."""
        about: dict[str, Any] = {"course": self._course, "plan": self._plan.to_dict(), "versions": rundir.versions()}
        faults = Faults.from_environment(self._mesh.rank)
        saver = Saver(
            self._root,
            engine.rank_engine,
            self._cfg.checkpoint,
            about=about,
            shapes=self._shapes,
            tell=tell,
            phase=faults,
        )
        try:
            yield saver
        except NumericsError:
            # Every rank is here, so a save can still be finished. After any other error some may be missing.
            saver.close()
            raise
        saver.close()


def weights(cfg: Config, plan: Plan, run: RunDir, mesh: Mesh) -> tuple[Engine, str]:
    """An engine to evaluate with, and where its weights come from. Collective over all ranks.

    Raises:
        CheckpointError: there is no checkpoint, or it is not whole, or of another model. An older one is not taken in
            silence.
    """
    asked = rundir.read_json(run.evaluation)
    if asked is None or asked["checkpoints"] is None:
        return Engine(cfg, plan, mesh), cfg.model.name
    root = Path(asked["checkpoints"])
    passed_over: list[str] = []
    found = loading.find(root, cfg.checkpoint.step, mesh, tell=passed_over.append)
    if found is None:
        raise CheckpointError(f"{root} holds no checkpoint; train with checkpoint.every=50")
    if passed_over:
        raise CheckpointError(f"{passed_over[0]}; the newest whole one: checkpoint.step={found.manifest.step}")
    manifest.check_same_model(found.manifest, parameter_shapes(cfg), where=found.folder)
    engine = Engine(cfg, plan, mesh, empty=True)
    loading.load(found, engine.rank_engine, weights_only=True)
    return engine, str(found.folder)
