"""The `stack` command: one verb, then Hydra overrides."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stack import __version__
from stack.errors import StackError, UsageError

if TYPE_CHECKING:
    from stack.train.rundir import RunDir

_USAGE = """stack {version}: ZeRO-3, pipeline parallelism and activation checkpointing in one DeepSpeed run

usage: stack VERB [ARGUMENTS] [OVERRIDES]

{verbs}

Overrides are Hydra's: key=value, or group=choice such as experiment=8b. A sweep: stack train -m key=1,2
Every key with its meaning: stack/config/schema.py
Exit codes: 0 done, 2 usage, 3 config, 4 layout, 5 data, 6 checkpoint, 7 numerics, 8 hang, 9 a rank failed,
75 saved on SIGTERM and to be started again, 128 + signal when it was ended at once (130 for Ctrl-C)
"""
#: Hydra's words for a sweep.
_MULTIRUN = ("-m", "--multirun")
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
    """plan, prepare the data, launch and follow one run; with -m one for each of several values"""
    if any(word in _MULTIRUN for word in overrides):
        from stack.launch.sweep.sweep import sweep

        return sweep([word for word in overrides if word not in _MULTIRUN])
    from stack.launch import driver
    from stack.launch.sweep.sweep import end_with_sweep

    end_with_sweep()
    return driver.train(overrides)


def resume(arguments: Sequence[str]) -> int:
    """go on with a run from its newest whole checkpoint, in any layout"""
    from stack.launch import driver
    from stack.launch.sweep.sweep import end_with_sweep

    end_with_sweep()
    return driver.resume(*_run_and_overrides("resume", arguments))


def evaluate(arguments: Sequence[str]) -> int:
    """held-out loss and perplexity of a run's checkpoint or of an exported folder"""
    from stack.launch import driver

    if arguments and (Path(arguments[0]) / driver.EXPORTED).is_file():
        return driver.evaluate(Path(arguments[0]).resolve(), arguments[1:])
    run, overrides = _run_and_overrides("eval", arguments)
    return driver.evaluate(run.path, overrides)


def export(arguments: Sequence[str]) -> int:
    """write a checkpoint as a Hugging Face folder"""
    run, rest = _run_and_overrides("export", arguments)
    out, *overrides = rest or ["="]
    if "=" in out:
        raise UsageError("stack export needs the folder to write to; write stack export RUN_DIR OUT")
    from stack.launch import checkpoints
    from stack.train import tracking

    code = checkpoints.export(run, Path(out).resolve(), overrides)
    tracking.remember_export(run, Path(out).resolve())
    return code


def verify(arguments: Sequence[str]) -> int:
    """read every checkpoint of a run in full and compare it with its manifest"""
    run, rest = _run_and_overrides("verify", arguments)
    if rest:
        raise UsageError(f"{rest[0]}: stack verify takes a run directory and nothing else")
    from stack.launch import checkpoints

    return checkpoints.verify_run(run)


def doctor(arguments: Sequence[str]) -> int:
    """look at the hosts and links of a run before it; --parity: also at its numbers"""
    from stack.launch.doctor import PARITY, examine

    overrides = [word for word in arguments if word != PARITY]
    if flag := next((word for word in overrides if word.startswith("-")), None):
        raise UsageError(f"{flag}: stack doctor knows {PARITY}, and overrides key=value")
    return examine(overrides, parity=len(overrides) < len(arguments))


def wandb_sync(arguments: Sequence[str]) -> int:
    """upload all of a run to Weights & Biases; what is there already is not sent again"""
    run, rest = _run_and_overrides("wandb-sync", arguments)
    from stack.train import tracking

    return tracking.sync(run, rest)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "plan": plan,
    "data": data,
    "train": train,
    "resume": resume,
    "export": export,
    "eval": evaluate,
    "verify": verify,
    "doctor": doctor,
    "wandb-sync": wandb_sync,
}
#: What comes ahead of the overrides.
_ARGUMENTS = {
    "resume": "RUN_DIR ",
    "export": "RUN_DIR OUT ",
    "eval": "RUN_DIR|EXPORTED ",
    "verify": "RUN_DIR ",
    "train": "[-m] ",
    "doctor": "[--parity] ",
    "wandb-sync": "RUN_DIR ",
}
#: What `stack VERB --help` shows, with the keys that one most likely looks for.
_EXAMPLES = {
    "plan": ["stack plan experiment=70b", "stack plan parallel.pipeline=4 parallel.zero=3 launch.ranks_per_node=8"],
    "data": ["stack data data.source=files data.paths=[texts]", "stack data data.source=hf data.name=ORG/NAME"],
    "train": [
        "stack train train.steps=500 precision.dtype=bf16",
        "stack train launch.hostfile=hosts run.root=/shared/runs",
        "stack train -m optim.lr=1e-3,3e-3 hydra.launcher.max_parallel=2",
    ],
    "resume": [
        "stack resume RUN_DIR parallel.pipeline=1      # in another layout",
        "stack resume RUN_DIR train.steps=1000         # to another end",
        "stack resume RUN_DIR checkpoint.step=400      # from an earlier checkpoint",
        "stack resume RUN_DIR batch.global_size=64 checkpoint.allow=[batch]",
    ],
    "export": ["stack export RUN_DIR OUT export.dtype=bf16", "stack export RUN_DIR OUT checkpoint.step=400"],
    "eval": [
        "stack eval RUN_DIR train.eval_sequences=1000",
        "stack eval RUN_DIR checkpoint.step=400",
        "stack eval OUT",
    ],
    "verify": ["stack verify RUN_DIR"],
    "doctor": ["stack doctor launch.hostfile=hosts", "stack doctor --parity parallel.pipeline=4"],
    "wandb-sync": ["stack wandb-sync RUN_DIR log.wandb.timeout_s=600"],
}


def _run_and_overrides(verb: str, arguments: Sequence[str]) -> tuple["RunDir", list[str]]:
    """The run that a verb is about, and what follows it.

    Raises:
        UsageError: there is no run directory.
    """
    from stack.train.rundir import RunDir

    if not arguments or "=" in arguments[0]:
        out = " OUT" if verb == "export" else ""
        raise UsageError(f"stack {verb} needs a run directory; write stack {verb} runs/NAME/RUN_ID{out}")
    path, *rest = arguments
    # Resolved: checkpoints may be kept elsewhere by the name that the folder really has.
    try:
        run = RunDir(Path(path).resolve())
        is_run = run.config.is_file() and not run.evaluation.exists()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{path[:200]} cannot be looked up ({error}); write stack {verb} runs/NAME/RUN_ID") from error
    if not is_run:
        inside = sorted(Path(path).glob("*/config.yaml")) or sorted(Path(path).glob("*/*/config.yaml"))
        hint = f"; did you mean {inside[-1].parent}?" if inside else "; its path is what stack train prints first"
        what = "no run directory and no export" if verb == "eval" else "no run directory"
        raise UsageError(f"{path} is {what}, it has no config.yaml{hint}")
    return run, rest


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
    except (RuntimeError, ImportError) as error:
        # An interrupt inside an import comes out as whatever that makes of it.
        if not _was_interrupted(error):
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader is gone, as after `| head`; what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or _BROKEN_PIPE
    return code


def _was_interrupted(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


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
        print(f"usage: stack {verb} {_ARGUMENTS.get(verb, '')}[OVERRIDES]\n\n{VERBS[verb].__doc__}\n")
        print("\n".join(f"  {example}" for example in _EXAMPLES[verb]))
        return 0
    return VERBS[verb](overrides)


def _usage() -> str:
    rows = [(f"{name} {_ARGUMENTS.get(name, '')}", function.__doc__) for name, function in VERBS.items()]
    verbs = "\n".join(f"  {call:<22} {about}" for call, about in rows)
    return _USAGE.format(version=__version__, verbs=verbs)


if __name__ == "__main__":
    sys.exit(main())
