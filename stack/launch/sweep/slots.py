"""Assigns GPUs to jobs. No two running jobs share a GPU."""

from collections.abc import Sequence
from typing import Any

from stack.errors import ConfigError, LayoutError
from stack.launch.sweep.jobs import Job, is_elsewhere, shares_hosts
from stack.plan.policies import visible_devices


class Slots:
    """The free GPUs of this host. On a host without GPUs, jobs need none."""

    def __init__(self) -> None:
        self._free = visible_devices()
        self.total = len(self._free)

    def take(self, count: int) -> list[str] | None:
        """Takes `count` free GPUs. None if fewer are free."""
        if not self.total:
            return []
        if len(self._free) < count:
            return None
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give_back(self, devices: list[str]) -> None:
        self._free += devices


def devices_of_a_job(devices: Any, slots: Slots) -> int | None:
    """`hydra.launcher.devices` as a number; None if each job takes one GPU for each rank, or none.

    Raises:
        ConfigError: the value is not `auto`, and not a number of GPUs that this host has.
    """
    if devices == "auto":
        return None
    if type(devices) is not int or devices < 1:
        raise ConfigError(
            f"hydra.launcher.devices={devices}: auto or the number of GPUs of one job is needed; use auto"
        )
    if not slots.total:
        raise ConfigError(f"hydra.launcher.devices={devices}: this host has no GPU that can be seen; drop it")
    if devices > slots.total:
        raise ConfigError(
            f"hydra.launcher.devices={devices}: there are {slots.total} GPUs here; the most is {slots.total}"
        )
    return devices


def check_room(slots: Slots, jobs: Sequence[Job], max_parallel: int) -> None:
    """
    Raises:
        LayoutError: `max_parallel` jobs do not fit on the hosts or GPUs at the same time.
    """
    if max_parallel > 1 and any(shares_hosts(job.cfg) for job in jobs):
        raise LayoutError(
            f"hydra.launcher.max_parallel={max_parallel}: all jobs run on the same hosts, and would use the same "
            "GPUs; use hydra.launcher.max_parallel=1"
        )
    here = [job for job in jobs if not is_elsewhere(job.cfg)]
    each, max_parallel = max((job.devices for job in here), default=0), min(max_parallel, len(here))
    if slots.total and each > slots.total:
        raise LayoutError(f"a job needs {each} GPUs and there are {slots.total} here; use fewer ranks")
    if slots.total and each * max_parallel > slots.total:
        raise LayoutError(
            f"hydra.launcher.max_parallel={max_parallel} jobs of {each} GPUs need {max_parallel * each}, and there are "
            f"{slots.total}; use hydra.launcher.max_parallel={slots.total // each}"
        )
