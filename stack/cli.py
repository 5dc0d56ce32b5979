"""The `stack` command: one verb, then Hydra overrides."""

import os
import sys
from collections.abc import Callable, Sequence

from stack import __version__
from stack.errors import StackError, UsageError

_USAGE = """stack {version}: ZeRO-3, pipeline parallelism and activation checkpointing in one DeepSpeed run

usage: stack VERB [OVERRIDES]

{verbs}

Overrides are Hydra's: key=value, or group=choice such as experiment=8b.
Every key with its meaning: stack/config/schema.py
Exit codes: 0 done, 2 usage, 3 config, 4 layout, 5 data, 7 numerics, 8 hang, 9 a rank failed,
128 + signal when it was stopped (130 for Ctrl-C)
"""
#: What a shell reports for a command that SIGPIPE ended.
_BROKEN_PIPE = 141


def plan(overrides: Sequence[str]) -> int:
    """print the layout with the reason of each number; starts no process"""
    from stack.config.compose import compose
    from stack.plan.layout import make_plan
    from stack.plan.report import render

    cfg = compose(overrides)
    print(render(make_plan(cfg), cfg))
    return 0


def data(overrides: Sequence[str]) -> int:
    """tokenize the corpus into shards; safe to interrupt and to repeat"""
    from stack.config.compose import compose
    from stack.data.shards import prepare

    cfg = compose(overrides)
    print(prepare(cfg.data, seed=cfg.data.split_seed))
    return 0


def train(overrides: Sequence[str]) -> int:
    """plan, prepare the data, launch and follow one run"""
    from stack.launch import driver

    return driver.train(overrides)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {"plan": plan, "data": data, "train": train}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; an error for the user is one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
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
    except BrokenPipeError:
        # The reader is gone, as after `| head`; what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or _BROKEN_PIPE
    return code


def _open_closed_streams() -> None:
    """Output that a shell closed (`>&-`) goes nowhere, rather than into the next file that is opened."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


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
        print(f"usage: stack {verb} [OVERRIDES]\n\n{VERBS[verb].__doc__}")
        return 0
    return VERBS[verb](overrides)


def _usage() -> str:
    verbs = "\n".join(f"  {name:<8} {function.__doc__}" for name, function in VERBS.items())
    return _USAGE.format(version=__version__, verbs=verbs)


if __name__ == "__main__":
    sys.exit(main())
