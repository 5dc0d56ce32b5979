"""The verbs of the `stack` command: one function each, with what `--help` shows of it."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stack.errors import UsageError

if TYPE_CHECKING:
    from stack.train.rundir import RunDir

#: Hydra's words for a sweep.
_MULTIRUN = ("-m", "--multirun")


@dataclass(frozen=True)
class Verb:
    """A verb as the user types it, and the function that runs it."""

    name: str
    arguments: str
    """What comes ahead of the overrides, as the usage line writes it; empty where nothing does."""
    examples: tuple[str, ...]
    """Lines of `stack VERB --help`, with the keys that one most likely looks for."""
    run: Callable[[Sequence[str]], int]
    """Takes the words after the verb, returns the exit code, and raises StackError. Its docstring is the help line."""

    @property
    def about(self) -> str:
        return str(self.run.__doc__)


VERBS: dict[str, Verb] = {}


def _verb(name: str, arguments: str = "", *, examples: Sequence[str]) -> Callable[[Callable], Callable]:
    """Enters a function into `VERBS`, which are shown in the order in which they stand here."""

    def enter(run: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
        VERBS[name] = Verb(name, arguments, tuple(examples), run)
        return run

    return enter


@_verb(
    "plan",
    examples=[
        "stack plan experiment=70b",
        "stack plan parallel.pipeline=4 parallel.zero=3 launch.ranks_per_node=8",
    ],
)
def plan(overrides: Sequence[str]) -> int:
    """print the layout with the reason of each number; starts no process"""
    from stack.config.compose import compose
    from stack.plan.layout import make_plan
    from stack.plan.report import render

    cfg = compose(overrides)
    print(render(make_plan(cfg), cfg))
    return 0


@_verb(
    "show",
    examples=[
        "stack show experiment=8b",
        "stack show --config-dir DIR experiment=mine optim.lr=1e-4",
    ],
)
def show(overrides: Sequence[str]) -> int:
    """print the config of a run as YAML, every key with its value; starts no process"""
    from stack.config.compose import compose, to_yaml

    text = to_yaml(compose(overrides))
    print(f"# stack train {shlex.join(overrides)}".rstrip(), text, sep="\n", end="")
    return 0


@_verb(
    "data",
    examples=[
        "stack data data.source=files data.paths=[texts]",
        "stack data data.source=hf data.name=ORG/NAME",
    ],
)
def data(overrides: Sequence[str]) -> int:
    """tokenize the corpus into shards; safe to interrupt and to repeat"""
    from stack.config.compose import compose
    from stack.data.shards import prepare

    cfg = compose(overrides)
    print(prepare(cfg.data, seed=cfg.data.split_seed))
    return 0


@_verb(
    "train",
    "[-m]",
    examples=[
        "stack train train.steps=500 precision.dtype=bf16",
        "stack train launch.hostfile=hosts run.root=/shared/runs",
        "stack train -m optim.lr=1e-3,3e-3 hydra.launcher.max_parallel=2",
    ],
)
def train(overrides: Sequence[str]) -> int:
    """plan, prepare the data, launch and follow one run; with -m one for each of several values"""
    if any(word in _MULTIRUN for word in overrides):
        from stack.launch.sweep.sweep import sweep

        return sweep([word for word in overrides if word not in _MULTIRUN])
    from stack.launch import driver
    from stack.launch.sweep.sweep import end_with_sweep

    end_with_sweep()
    return driver.train(overrides)


@_verb(
    "resume",
    "RUN_DIR",
    examples=[
        "stack resume RUN_DIR parallel.pipeline=1      # in another layout",
        "stack resume RUN_DIR train.steps=1000         # to another end",
        "stack resume RUN_DIR checkpoint.step=400      # from an earlier checkpoint",
        "stack resume RUN_DIR batch.global_size=64 checkpoint.allow=[batch]",
    ],
)
def resume(arguments: Sequence[str]) -> int:
    """go on with a run from its newest whole checkpoint, in any layout"""
    from stack.launch import driver
    from stack.launch.sweep.sweep import end_with_sweep

    end_with_sweep()
    return driver.resume(*_run_and_overrides("resume", arguments))


@_verb(
    "export",
    "RUN_DIR OUT",
    examples=[
        "stack export RUN_DIR OUT export.dtype=bf16",
        "stack export RUN_DIR OUT checkpoint.step=400",
    ],
)
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


@_verb(
    "eval",
    "RUN_DIR|EXPORTED",
    examples=[
        "stack eval RUN_DIR train.eval_sequences=1000",
        "stack eval RUN_DIR checkpoint.step=400",
        "stack eval OUT",
    ],
)
def evaluate(arguments: Sequence[str]) -> int:
    """held-out loss and perplexity of a run's checkpoint or of an exported folder"""
    from stack.launch import driver

    if arguments and (Path(arguments[0]) / driver.EXPORTED).is_file():
        return driver.evaluate(Path(arguments[0]).resolve(), arguments[1:])
    run, overrides = _run_and_overrides("eval", arguments)
    return driver.evaluate(run.path, overrides)


@_verb(
    "verify",
    "RUN_DIR",
    examples=[
        "stack verify RUN_DIR",
    ],
)
def verify(arguments: Sequence[str]) -> int:
    """read every checkpoint of a run in full and compare it with its manifest"""
    run, rest = _run_and_overrides("verify", arguments)
    if rest:
        raise UsageError(f"{rest[0]}: stack verify takes a run directory and nothing else")
    from stack.launch import checkpoints

    return checkpoints.verify_run(run)


@_verb(
    "doctor",
    "[--parity]",
    examples=[
        "stack doctor launch.hostfile=hosts",
        "stack doctor --parity parallel.pipeline=4",
    ],
)
def doctor(arguments: Sequence[str]) -> int:
    """look at the hosts and links of a run before it; --parity: also at its numbers"""
    from stack.config.recipes import FLAG
    from stack.launch.doctor import PARITY, examine

    overrides = [word for word in arguments if word != PARITY]
    if flag := next((word for word in overrides if word.startswith("-") and not word.startswith(FLAG)), None):
        raise UsageError(f"{flag}: stack doctor knows {PARITY}, {FLAG} DIR, and overrides key=value")
    return examine(overrides, parity=len(overrides) < len(arguments))


@_verb(
    "wandb-sync",
    "RUN_DIR",
    examples=[
        "stack wandb-sync RUN_DIR log.wandb.timeout_s=600",
    ],
)
def wandb_sync(arguments: Sequence[str]) -> int:
    """upload all of a run to Weights & Biases; what is there already is not sent again"""
    run, rest = _run_and_overrides("wandb-sync", arguments)
    from stack.train import tracking

    return tracking.sync(run, rest)


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
