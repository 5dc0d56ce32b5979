"""Injects faults at named moments, for tests: STACK_FAULT="kill:rank=1,step=9,phase=save.before_manifest"."""

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
#: kill: SIGKILL to this process; stop: SIGSTOP to this process; full: raise ENOSPC; sleep: for `seconds`.
KINDS = ("kill", "stop", "full", "sleep")
_FIELDS = {"rank": int, "step": int, "phase": str, "seconds": float}


@dataclass(frozen=True)
class Fault:
    """Happens once, at the first moment that has its phase, rank and step. A rank or step of None matches any."""

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
            OSError: ENOSPC, if the kind is `full`.
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
    """The faults of this process. Called at each phase; without faults the call does nothing."""

    def __init__(self, faults: tuple[Fault, ...] = ()):
        self._waiting = list(faults)

    @classmethod
    def from_environment(cls, rank: int) -> Self:
        """The faults of STACK_FAULT that name `rank` or no rank.

        Raises:
            ConfigError: the value is malformed, or names an unknown phase.
        """
        found = [_parse(text) for text in os.environ.get(FAULT, "").split(";") if text.strip()]
        return cls(tuple(fault for fault in found if fault.rank in (None, rank)))

    def __call__(self, phase: str, step: int) -> None:
        """Makes the faults of this moment happen, each once.

        Raises:
            OSError: ENOSPC, by a fault of kind `full`.
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
            raise ConfigError(f"{FAULT}={text}: {pair!r} must be one of {_listed(tuple(_FIELDS))}=..., each given once")
        try:
            values[name] = _FIELDS[name](value)
        except ValueError as error:
            raise ConfigError(f"{FAULT}={text}: {name} is a number, as in {name}=1") from error
    if values.get("phase") not in PHASES:
        raise ConfigError(f"{FAULT}={text}: phase must be {_listed(PHASES)}")
    if (kind == "sleep") != (values.get("seconds", 0) > 0):
        raise ConfigError(f"{FAULT}={text}: seconds is for sleep only, as in sleep:phase=step,seconds=2")
    return Fault(kind, **values)


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
