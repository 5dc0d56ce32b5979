"""The order that the driver sends to the agent of a host, as JSON on the agent's standard input."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A process to start."""

    argv: list[str]
    environment: dict[str, str]
    """Variables to add to the host's own."""
    rank: int | None = None
    """The rank of the process, if the command starts a rank and no launcher."""


@dataclass(frozen=True)
class Order:
    """The order for one host."""

    run: str
    """The run directory."""
    host: str
    ranks: list[int]
    """The ranks that the commands start."""
    commands: list[Command]
    environment: dict[str, str]
    grace_s: float
    """Seconds between SIGTERM and SIGKILL."""
    silence_s: float | None
    """Longest time without a line from the driver; None on the driver's host, where the agent always sees its end."""
