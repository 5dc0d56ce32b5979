"""`stack resume`: checks the overrides before anything is changed, reports the changes, and starts the ranks."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict

from stack.checkpoint import manifest, room
from stack.config.changes import changes
from stack.config.compose import as_saved
from stack.config.schema import Config
from stack.errors import CheckpointError, UsageError
from stack.launch.driver import check_weights, launch, plan_of
from stack.launch.reread import config_of, of_run
from stack.launch.signals import stop_requests
from stack.plan.policies import state_names
from stack.train import rundir, stop_request
from stack.train.inputs import course
from stack.train.lock import RunLock
from stack.train.lr import learning_rate
from stack.train.rundir import RunDir

#: A smaller relative change of the learning rate is no jump.
_SMOOTH = 1e-3


def resume(run: RunDir, overrides: Sequence[str]) -> int:
    """Goes on with a run from its newest whole checkpoint, in the layout that the overrides ask for.

    Raises:
        StackError: as `driver.train`; or the run is done or running, or its checkpoint does not fit the settings.
    """
    before = as_saved(run.config)
    cfg = config_of(run, overrides)
    with RunLock(run.path):
        stop_request.clear(run)
        plan = plan_of(cfg)
        cfg, corpus = of_run(run, cfg, plan)
        there = _checkpoints(cfg, before, run)
        if not there:
            # The run begins again with step 1.
            check_weights(cfg)
        step = _check_goes_on(cfg, before, run, there, course(cfg, corpus))
        room.check(cfg, plan, run.path)
        notes = [line for line in (_told_changes(cfg, before), step and jump(cfg, before, step)) if line]
        with stop_requests() as requests:
            rundir.begin_again(run, cfg, plan, corpus=corpus)
            # On a full disk the notes are lost, but the run starts.
            with contextlib.suppress(OSError), run.notes.open("a") as file:
                file.writelines(f"{note}\n" for note in notes)
            print(*notes, sep="\n", end="\n" * bool(notes))
            return launch(cfg, plan, run, requests)


def _told_changes(cfg: Config, before: Config) -> str | None:
    found = changes(asdict(before), asdict(cfg))
    return f"changed: {'; '.join(map(str, found))}" if found else None


def jump(cfg: Config, before: Config, step: int) -> str | None:
    """How the learning rate jumps after `step` finished steps, and the changed keys that cause the jump. None if the
    rate stays the same or continues as without the changes."""

    def rate(of: Config, number: int) -> float:
        return learning_rate(number, of.train.steps, optim=of.optim, schedule=of.schedule)

    last, now = rate(before, step - 1), rate(cfg, step)
    expected = rate(before, step) if step < before.train.steps else last
    if any(math.isclose(now, smooth, rel_tol=_SMOOTH) for smooth in (last, expected)):
        return None
    causes = [
        change
        for change in changes(asdict(before), asdict(cfg))
        if change.key in ("train.steps", "optim.lr") or change.key.startswith("schedule.")
    ]
    told = (
        f"the learning rate goes from {last:.2e} in step {step} to {now:.2e} in step {step + 1}, by "
        f"{'; '.join(map(str, causes))}"
    )
    if [cause.key for cause in causes] != ["train.steps"]:
        return told
    # A user who changes only train.steps may not expect another learning rate.
    keep = f"schedule.kind=constant optim.lr={last:.6g}"
    return f"{told} under schedule.kind={cfg.schedule.kind}; to keep it, resume with {keep}"


def _checkpoints(cfg: Config, before: Config, run: RunDir) -> list[int]:
    """Steps of the run's checkpoints.

    Raises:
        CheckpointError: there is none in the folder of `cfg`, but there are some in the folder of `before`.
    """
    root, old = (manifest.root_of(c.checkpoint.path, run.path) for c in (cfg, before))
    there = manifest.steps(root)
    if not there and root != old and manifest.steps(old):
        raise CheckpointError(
            f"{root} holds no checkpoint, but {old} does; move that folder to {root}, or keep checkpoint.path"
        )
    return there


def _check_goes_on(
    cfg: Config, before: Config, run: RunDir, there: Sequence[int], its_course: dict[str, object]
) -> int | None:
    """Checks what can be checked before anything is changed. The ranks read the checkpoint itself later.

    Args:
        there: steps of the run's checkpoints.

    Returns:
        The step of the checkpoint that the ranks will probably use; None if there is none.
    """
    root, step = manifest.root_of(cfg.checkpoint.path, run.path), cfg.checkpoint.step
    manifest.check_step(step, there, where=root)
    for candidate in reversed(there) if step == "auto" else [step]:
        folder = manifest.folder_of(root, candidate)
        try:
            found = manifest.read(folder)
        except CheckpointError:
            # The ranks report what is wrong with this checkpoint, and skip it or end.
            continue
        if cfg.model != before.model:
            from stack.models.build import parameter_shapes

            manifest.check_same_model(found, parameter_shapes(cfg), where=folder)
        manifest.check_same_course(found, cfg, its_course, state_names(cfg), where=folder)
        if candidate >= cfg.train.steps:
            raise UsageError(
                f"{run.path} is at step {candidate} and train.steps={cfg.train.steps}: nothing is left to do; to go on "
                f"add train.steps={2 * candidate}"
            )
        return candidate
    return None
