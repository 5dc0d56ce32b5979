"""The verbs of the `stack` command. Each is a function whose docstring is its line in `stack --help`."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stack.cli.arguments import is_path, run_and_overrides
from stack.errors import UsageError

#: Seconds that `stack stop` waits by default for the run to end.
_STOP_S = 600
#: Hydra's options that start a sweep.
_MULTIRUN = ("-m", "--multirun")
#: Option of `stack data`.
_VERIFY = "--verify"


@dataclass(frozen=True)
class Verb:
    """A verb as the user types it, and the function that runs it."""

    name: str
    arguments: str
    """The arguments ahead of the overrides, as the usage line shows them; empty if the verb takes none."""
    examples: tuple[str, ...]
    """Example commands that `stack VERB --help` shows."""
    run: Callable[[Sequence[str]], int]
    """Takes the words after the verb and returns the exit code; may raise StackError. Its docstring is the help line.
    """

    @property
    def about(self) -> str:
        return str(self.run.__doc__)


VERBS: dict[str, Verb] = {}


def _verb(name: str, arguments: str = "", *, examples: Sequence[str]) -> Callable[[Callable], Callable]:
    """Decorator that enters a function into `VERBS`. `stack --help` lists the verbs in the order of this file."""

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
    """print the layout with the reason for each number; starts no process"""
    from stack.config.compose import compose
    from stack.plan.layout import make_plan
    from stack.plan.report import render
    from stack.train.inputs import sequences_of_epoch

    cfg = compose(overrides)
    layout = make_plan(cfg)
    print(render(layout, cfg, sequences=sequences_of_epoch(cfg, layout)))
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
    "[--verify]",
    examples=[
        "stack data data.source=files data.paths=[texts]",
        "stack data data.source=hf data.name=ORG/NAME",
        "stack data --verify data.source=files data.paths=[texts]",
    ],
)
def data(arguments: Sequence[str]) -> int:
    """tokenize the corpus into shards, safe to repeat; --verify: compare existing shards with their hashes"""
    from stack.config.compose import compose
    from stack.data.shards import prepare, verify
    from stack.data.vocabulary import check_choice

    cfg = compose([word for word in arguments if word != _VERIFY])
    check_choice(cfg)
    print((verify if _VERIFY in arguments else prepare)(cfg.data, seed=cfg.data.split_seed))
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
    """plan, prepare the data, launch and follow one run; -m: a sweep, one run for each of several values"""
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
    from stack.launch import resume
    from stack.launch.sweep.sweep import end_with_sweep

    end_with_sweep()
    return resume.resume(*run_and_overrides("resume", arguments, "RUN_DIR"))


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
    run, rest = run_and_overrides("export", arguments, "RUN_DIR OUT")
    if not rest or not is_path(rest[0]):
        raise UsageError(
            "stack export needs the folder to write to ahead of the overrides; write stack export RUN_DIR OUT (./OUT "
            "if the folder is named like a key of the config)"
        )
    out, *overrides = rest
    from stack.launch import checkpoints
    from stack.train import tracking

    try:
        folder = Path(out).resolve()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{out} cannot be written ({error}); name a folder that does not exist yet") from error
    code = checkpoints.export(run, folder, overrides)
    tracking.remember_export(run, folder)
    return code


@_verb(
    "eval",
    "RUN_DIR|MODEL",
    examples=[
        "stack eval RUN_DIR train.eval_sequences=1000",
        "stack eval RUN_DIR checkpoint.step=400",
        "stack eval OUT                                # an exported folder, on the held-out text of its run",
        "stack eval FOLDER data.source=files data.paths=[texts] data.seq_len=1024",
    ],
)
def evaluate(arguments: Sequence[str]) -> int:
    """held-out loss and perplexity of a run's checkpoint, or of a Hugging Face folder or hub name"""
    from stack.config.model_folder import is_hub_name
    from stack.launch import evaluate

    if arguments and is_path(arguments[0]):
        path, *overrides = arguments
        if is_hub_name(path):
            return evaluate.evaluate_folder(path, overrides)
        if (Path(path) / "config.json").is_file():
            return evaluate.evaluate_folder(str(Path(path).resolve()), overrides)
    return evaluate.evaluate_run(*run_and_overrides("eval", arguments, "RUN_DIR"))


@_verb(
    "verify",
    "RUN_DIR",
    examples=[
        "stack verify RUN_DIR",
    ],
)
def verify(arguments: Sequence[str]) -> int:
    """read every checkpoint of a run in full and compare it with its manifest"""
    run, rest = run_and_overrides("verify", arguments, "RUN_DIR")
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
    """check the hosts and links that a run would use; --parity: also compare its numbers with one process"""
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
    """upload a run to Weights & Biases; only what W&B does not have yet is sent"""
    run, rest = run_and_overrides("wandb-sync", arguments, "RUN_DIR")
    from stack.train import tracking

    return tracking.sync(run, rest)


@_verb(
    "stop",
    "RUN_DIR",
    examples=[
        "stack stop RUN_DIR                 # saves first, as on Ctrl-C",
        "stack stop RUN_DIR --now           # ends at once",
        "stack stop RUN_DIR --timeout=3600  # waits at most an hour, instead of ten minutes",
    ],
)
def stop(arguments: Sequence[str]) -> int:
    """ask a run to save and end, from any host that sees its directory; --now: end at once without saving"""
    run, rest = run_and_overrides("stop", arguments, "RUN_DIR")
    timeout_s = _STOP_S
    for word in rest:
        name, _, value = word.partition("=")
        if name == "--timeout" and value.isdecimal() and int(value):
            timeout_s = int(value)
        elif word != "--now":
            raise UsageError(f"{word}: stack stop knows --now and --timeout=SECONDS; write stack stop RUN_DIR --now")
    from stack.launch.stopping import stop

    return stop(run, now="--now" in rest, timeout_s=timeout_s)


@_verb(
    "ls",
    "[RUNS]",
    examples=[
        "stack ls                           # the runs in runs/",
        "stack ls /shared/runs",
    ],
)
def ls(arguments: Sequence[str]) -> int:
    """list the runs in a folder: state, step, losses, pace and time left"""
    if len(arguments) > 1 or any(word.startswith("-") for word in arguments):
        raise UsageError(f"{arguments[-1]}: stack ls takes one folder of runs; write stack ls RUNS")
    from stack.launch.listing import listing

    print(listing(Path(arguments[0] if arguments else "runs")))
    return 0
