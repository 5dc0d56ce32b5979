"""Errors that end a run: one class per kind of person who must act, each with its exit code.

A message has three parts on one line: what was set, why it cannot work, the nearest setting that works.
"""


class StackError(Exception):
    """Base of every error the user is meant to read; `exit_code` is what the command ends with."""

    exit_code = 1


class UsageError(StackError):
    """The command line itself is wrong: an unknown verb or a missing argument."""

    exit_code = 2


class ConfigError(StackError):
    """A key does not exist, or its value has the wrong type or can never work."""

    exit_code = 3


class LayoutError(StackError):
    """Each value is legal alone, but ranks, stages, batch and model do not fit together."""

    exit_code = 4


class DataError(StackError):
    """The corpus, the tokenizer or the token shards are missing, unreadable or do not match."""

    exit_code = 5


class CheckpointError(StackError):
    """A checkpoint or a weights file is missing, damaged, or of another model."""

    exit_code = 6


class NumericsError(StackError):
    """The loss or the gradient norm stopped being finite."""

    exit_code = 7


class HangError(StackError):
    """Ranks made no progress for longer than `health.hang_timeout_s`."""

    exit_code = 8


class RankFailure(StackError):
    """A rank ended with an exception or was killed."""

    exit_code = 9


class Requeue(StackError):
    """Nothing is wrong: the run was asked to end, has saved its state, and wants to be started again."""

    exit_code = 75


class HostError(StackError):
    """A host of the run cannot be used: ssh, versions, devices, clock or the run directory."""

    exit_code = 9
