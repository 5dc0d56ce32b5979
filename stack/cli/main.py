"""Entry point of the `stack` command: runs one verb, and turns errors into one line on stderr and an exit code."""

import io
import os
import signal
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
75 the run saved and ended on Ctrl-C, SIGTERM or stack stop, and can be resumed; 128 + signal when it ended at once
without saving (130 for Ctrl-C)
"""
#: Exit code that a shell reports for a command killed by SIGPIPE (128 + 13).
_BROKEN_PIPE = 141


def command() -> int:
    """Entry point of the process: runs `main`, then ignores requests to end until the process has exited. Python
    restores the default actions of signals while it exits, so that another Ctrl-C would replace the exit code; an
    ignored signal stays ignored."""
    code = main()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code. A StackError is printed as one line on stderr.

    Args:
        argv: the words after `stack`; by default those of the process.
    """
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
        # Ctrl-C during an import can surface as a RuntimeError or ImportError with the KeyboardInterrupt as its cause.
        if not _was_interrupted(error):
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has ended, as in `stack ls | head`.
        _drop_output()
        return code or _BROKEN_PIPE
    except OSError as error:
        if not _is_full(sys.stdout):
            raise
        _drop_output()
        print(f"UsageError: the output cannot be written ({error.strerror}); redirect it elsewhere", file=sys.stderr)
        return code or UsageError.exit_code
    return code


def _is_full(stream: TextIO) -> bool:
    """Whether writing to a stream fails. If so, the OSError came from the output and not from another file."""
    try:
        stream.write("\n")
        stream.flush()
    except OSError:
        return True
    return False


def _drop_output() -> None:
    """Redirects stdout to /dev/null, so that flushing the rest of its buffer at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error or any of its causes is a KeyboardInterrupt."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _prepare_streams() -> None:
    """Makes stdout and stderr safe to write to. A stream that the shell closed (`>&-`) is replaced by /dev/null;
    otherwise the next file to be opened would get its descriptor and receive the output. Characters that the
    terminal's encoding lacks are written as backslash escapes instead of raising UnicodeEncodeError."""
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
        UsageError: the current folder was removed, so that no relative path can be resolved.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UsageError("the folder that this command was started in was removed; cd to another folder") from error


def _usage() -> str:
    verbs = "\n".join(f"  {_call(verb):<22} {verb.about}" for verb in VERBS.values())
    return _USAGE.format(version=__version__, verbs=verbs)


def _call(verb: Verb) -> str:
    return f"{verb.name} {verb.arguments} " if verb.arguments else f"{verb.name} "
