"""Which GPUs a job has. No two jobs at work have one in common."""

from collections.abc import Sequence
from typing import Any

from stack.errors import ConfigError, LayoutError
from stack.launch.sweep.jobs import Job, is_elsewhere, shares_hosts
from stack.plan.policies import visible_devices


class Slots:
    """The GPUs of this host, lent to jobs. On a host without any, jobs need none."""

    def __init__(self) -> None:
        self._free = visible_devices()
        self.total = len(self._free)

    def take(self, count: int) -> list[str] | None:
        """`count` GPUs that nobody has, or None where there are not so many now."""
        if not self.total:
            return []
        if len(self._free) < count:
            return None
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give_back(self, devices: list[str]) -> None:
        self._free += devices


def devices_of_a_job(devices: Any, slots: Slots) -> int | None:
    """`hydra.launcher.devices` as a number; None where each job takes a GPU a rank, or there are no GPUs.

    Raises:
        ConfigError: it is not `auto`, and not a number of GPUs that this host has.
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
        LayoutError: so many of the jobs do not fit beside each other.
    """
    if max_parallel > 1 and any(shares_hosts(job.cfg) for job in jobs):
        raise LayoutError(
            f"hydra.launcher.max_parallel={max_parallel}: the jobs have the same hosts, and would use the same GPUs "
            "there; use hydra.launcher.max_parallel=1"
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
