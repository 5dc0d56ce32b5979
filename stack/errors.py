"""Errors that are shown to the user as one line without a traceback. Each class has its own cause and exit code.

A message names what was set, why it cannot work, and the nearest setting that works.
"""


class StackError(Exception):
    """Base class of the errors that are meant for the user; the command exits with `exit_code`."""

    exit_code = 1


class UsageError(StackError):
    """The command line itself is wrong: an unknown verb or a missing argument."""

    exit_code = 2


class ConfigError(StackError):
    """A key does not exist, or its value has the wrong type or can never work."""

    exit_code = 3


class LayoutError(StackError):
    """Each value is legal by itself, but ranks, stages, batch and model do not fit together."""

    exit_code = 4


class DataError(StackError):
    """The corpus, the tokenizer or the token shards are missing, unreadable, or do not match each other."""

    exit_code = 5


class CheckpointError(StackError):
    """A checkpoint or a weights file is missing, damaged, or of another model."""

    exit_code = 6


class NumericsError(StackError):
    """The loss or the gradient norm became infinite or NaN."""

    exit_code = 7


class HangError(StackError):
    """Ranks made no progress for longer than `health.hang_timeout_s`."""

    exit_code = 8


class RankFailure(StackError):
    """A rank raised an exception or was killed."""

    exit_code = 9


class Requeue(StackError):
    """The run was asked to end and has saved a checkpoint; it can be started again. This is not a failure."""

    exit_code = 75


class HostError(StackError):
    """A host of the run cannot be used, because of its ssh, versions, devices, clock or access to the run directory."""

    exit_code = 9
