"""Starts a run at step 0, or at its newest whole checkpoint."""

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
    """Finds the checkpoint to resume from, and makes the parts of a run that depend on it. Collective over all
    ranks."""

    def __init__(self, cfg: Config, plan: Plan, run: RunDir, mesh: Mesh):
        """
        Args:
            cfg: the config.
            plan: the layout.
            run: the run directory.
            mesh: this rank's process groups.

        Raises:
            CheckpointError: there are checkpoints and none is whole, or the checkpoint is of another model, or other
                settings changed that need `checkpoint.allow`. No parameter was changed.
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
        """Makes the engine. With a checkpoint its parameters stay zero until `state` loads them."""
        return Engine(self._cfg, self._plan, self._mesh, empty=self._found is not None)

    def state(self, engine: Engine, *, tell: Callable[[str], None]) -> TrainState:
        """Loads the checkpoint, if there is one, into the engine, and returns the state of training. Checkpoints of
        later steps than this one are renamed, so that the run does not mix them with its own.

        Args:
            engine: the result of `engine`.
            tell: called with lines for the user.
        """
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
        """`before` of `Batches`: the sequences seen so far, minus those that the finished steps would have used with
        the present batch size. May be negative."""
        return state.sequences - state.step * self._cfg.batch.global_size

    @contextmanager
    def saver(self, engine: Engine, *, tell: Callable[[str], None]) -> Iterator[Saver]:
        """A context that yields the saver of this run's checkpoints, and waits at its end for a save in the background.

        Args:
            engine: the result of `engine`.
            tell: called with lines for the user.
        """
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
            # Every rank raises this error, so a running save can still finish. After other errors ranks may be missing.
            saver.close()
            raise
        saver.close()


def weights(cfg: Config, plan: Plan, run: RunDir, mesh: Mesh) -> tuple[Engine, str]:
    """An engine for an evaluation, and the source of its weights: a checkpoint folder, or `model.name`. Collective over
    all ranks.

    Raises:
        CheckpointError: there is no checkpoint, or the newest is not whole or is of another model. An older one is not
            used instead.
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
