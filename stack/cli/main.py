"""The `stack` command: one verb, then Hydra overrides."""

import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from stack import __version__
from stack.cli.verbs import VERBS, Verb
from stack.errors import StackError, UsageError

_USAGE = """stack {version}: ZeRO-3, pipeline parallelism and activation checkpointing in one DeepSpeed run

usage: stack VERB [ARGUMENTS] [OVERRIDES]

{verbs}

Overrides are Hydra's: key=value, or group=choice such as experiment=8b. A sweep: stack train -m key=1,2
Recipes of your own: experiment=mine.yaml, or --config-dir DIR with DIR/experiment/mine.yaml (docs/configs.md)
Every key with its meaning: stack/config/schema.py
Exit codes: 0 done, 2 usage, 3 config, 4 layout, 5 data, 6 checkpoint, 7 numerics, 8 hang, 9 a rank failed,
75 saved on Ctrl-C, SIGTERM or stack stop, and to be resumed; 128 + signal when it was ended at once (130 for Ctrl-C)
"""
#: What a shell reports for a command that SIGPIPE ended.
_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; an error for the user is one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    code = 0
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
    except StackError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (RuntimeError, ImportError) as error:
        # An interrupt inside an import comes out as whatever that makes of it.
        if not _was_interrupted(error):
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader is gone, as after `| head`; what is left in the buffer goes nowhere.
        _drop_output()
        return code or _BROKEN_PIPE
    except OSError as error:
        if not _is_full(sys.stdout):
            raise
        _drop_output()
        print(f"UsageError: the output cannot be written ({error.strerror}); send it elsewhere", file=sys.stderr)
        return code or UsageError.exit_code
    return code


def _is_full(stream: TextIO) -> bool:
    """Whether nothing can be written to a stream, so that it was the output that failed and no file."""
    try:
        stream.write("\n")
        stream.flush()
    except OSError:
        return True
    return False


def _drop_output() -> None:
    """Sends what is left in the buffer of stdout nowhere, so that the end of the process does not fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _was_interrupted(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _prepare_streams() -> None:
    """Output that a shell closed (`>&-`) goes nowhere, rather than into the next file that is opened; a letter that the
    terminal's encoding lacks is shown by its number, and ends nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else UsageError.exit_code
    if arguments[0] == "--version":
        print(__version__)
        return 0
    verb, *overrides = arguments
    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, n=1)
        raise UsageError(f"{verb}: no such verb; use {close[0] if close else ', '.join(VERBS)}")
    if any(word in ("-h", "--help") for word in overrides):
        print(f"usage: stack {_call(VERBS[verb])}[OVERRIDES]\n\n{VERBS[verb].about}\n")
        print("\n".join(f"  {example}" for example in VERBS[verb].examples))
        return 0
    _check_folder()
    return VERBS[verb].run(overrides)


def _check_folder() -> None:
    """
    Raises:
        UsageError: the current folder was removed; no relative path means anything in it.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UsageError("the folder that this command was started in is gone; cd to one that is there") from error


def _usage() -> str:
    verbs = "\n".join(f"  {_call(verb):<22} {verb.about}" for verb in VERBS.values())
    return _USAGE.format(version=__version__, verbs=verbs)


def _call(verb: Verb) -> str:
    return f"{verb.name} {verb.arguments} " if verb.arguments else f"{verb.name} "
