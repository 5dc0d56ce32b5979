"""`hydra/launcher=stack`: where Hydra looks for plugins. What a job is, is decided in stack/launch/sweep/."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class StackLauncherConf:
    _target_: str = "hydra_plugins.stack_launcher.StackLauncher"
    max_parallel: int = 1
    """Jobs at work at once."""
    devices: Any = "auto"
    """GPUs of one job; `auto` is its ranks on a host. Not used where there are none."""
    fail_fast: bool = False
    """Stop the others, and start no more, once a job has failed."""


ConfigStore.instance().store(group="hydra/launcher", name="stack", node=StackLauncherConf, provider="stack")


class StackLauncher(Launcher):
    """Hands a sweeper's jobs to the task function, all at once, and their objectives to the sweeper.

    The task function takes `(jobs, *, max_parallel, devices, fail_fast)`, each job being its overrides, and returns an
    objective a job, None where there is none. It is not called job by job, as Hydra's own launchers do.
    """

    def __init__(self, max_parallel: int, devices: Any, fail_fast: bool) -> None:
        self._settings = {"max_parallel": max_parallel, "devices": devices, "fail_fast": fail_fast}
        self._counts_failures = False
        self._task: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:  # noqa: ARG002
        self._task = task_function
        # The basic sweeper ends at the first failure that it is told of; Optuna's can be asked to bear some.
        self._counts_failures = "max_failure_rate" in config.hydra.sweeper

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:  # noqa: ARG002
        objectives = self._task([list(overrides) for overrides in job_overrides], **self._settings)
        return [self._told(list(job), value) for job, value in zip(job_overrides, objectives, strict=True)]

    def _told(self, overrides: list[str], objective: float | None) -> JobReturn:
        told = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
        told.return_value = objective
        if objective is None and self._counts_failures:
            told.status = JobStatus.FAILED
            told.return_value = RuntimeError(f"{' '.join(overrides)}: the job gave no held-out loss")
        return told
