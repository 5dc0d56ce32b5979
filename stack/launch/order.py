"""What the driver asks of the agent of a host. It travels as JSON, on the agent's standard input."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A process to start."""

    argv: list[str]
    environment: dict[str, str]
    """Variables beside the host's own."""
    rank: int | None = None
    """The rank that the process is, where no launcher is between."""


@dataclass(frozen=True)
class Order:
    """What the driver asks of one host."""

    run: str
    """The run directory."""
    host: str
    ranks: list[int]
    """That come from these commands."""
    commands: list[Command]
    environment: dict[str, str]
    grace_s: float
    """Between SIGTERM and SIGKILL."""
    silence_s: float | None
    """Longest time without a word from the driver; None where the end of the input cannot get lost."""
