"""Faults at named moments, for tests: STACK_FAULT="kill:rank=1,step=9,phase=save.before_manifest"."""

import errno
import os
import signal
import time
from dataclasses import dataclass
from typing import Any, Self

from stack.errors import ConfigError

#: Several faults are separated by `;`.
FAULT = "STACK_FAULT"
PHASES = (
    "step",
    "save.stage",
    "save.before_shard",
    "save.half_shard",
    "save.before_manifest",
    "save.before_rename",
)
#: kill: SIGKILL to this process; stop: SIGSTOP to it; full: the disk is; sleep: for `seconds`.
KINDS = ("kill", "stop", "full", "sleep")
_FIELDS = {"rank": int, "step": int, "phase": str, "seconds": float}


@dataclass(frozen=True)
class Fault:
    """Happens the first time that all it names is so; a rank or a step that it does not name is any."""

    kind: str
    phase: str
    rank: int | None = None
    step: int | None = None
    seconds: float = 0.0

    def meets(self, phase: str, step: int) -> bool:
        return self.phase == phase and self.step in (None, step)

    def happen(self) -> None:
        """
        Raises:
            OSError: ENOSPC, of kind `full`.
        """
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            time.sleep(self.seconds)


class Faults:
    """What is to go wrong in this process. Called at each phase; without faults that is nothing."""

    def __init__(self, faults: tuple[Fault, ...] = ()):
        self._waiting = list(faults)

    @classmethod
    def from_environment(cls, rank: int) -> Self:
        """Those of STACK_FAULT that are `rank`'s.

        Raises:
            ConfigError: the value is malformed, or names a phase that there is not.
        """
        found = [_parse(text) for text in os.environ.get(FAULT, "").split(";") if text.strip()]
        return cls(tuple(fault for fault in found if fault.rank in (None, rank)))

    def __call__(self, phase: str, step: int) -> None:
        """Lets those happen that wait for this moment, each once.

        Raises:
            OSError: the disk is full, by a fault of that kind.
        """
        for fault in [fault for fault in self._waiting if fault.meets(phase, step)]:
            self._waiting.remove(fault)
            fault.happen()


def _parse(text: str) -> Fault:
    kind, _, rest = text.strip().partition(":")
    if kind not in KINDS:
        raise ConfigError(f"{FAULT}={text}: no such fault; use {_listed(KINDS)}")
    values: dict[str, Any] = {}
    for pair in rest.split(","):
        name, _, value = pair.partition("=")
        if name not in _FIELDS or name in values:
            raise ConfigError(f"{FAULT}={text}: {pair!r} is not one of {_listed(tuple(_FIELDS))}=..., each once")
        try:
            values[name] = _FIELDS[name](value)
        except ValueError as error:
            raise ConfigError(f"{FAULT}={text}: {name} is a number, as in {name}=1") from error
    if values.get("phase") not in PHASES:
        raise ConfigError(f"{FAULT}={text}: phase must be {_listed(PHASES)}")
    if (kind == "sleep") != (values.get("seconds", 0) > 0):
        raise ConfigError(f"{FAULT}={text}: seconds belong to sleep, as in sleep:phase=step,seconds=2")
    return Fault(kind, **values)


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
