"""Tells paths from overrides among the words after a verb, and finds the run directory that a path names."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stack.errors import UsageError

if TYPE_CHECKING:
    from stack.train.rundir import RunDir


def is_path(word: str) -> bool:
    """Whether a word is the path of a folder, and not an override or an option.

    An existing folder is always a path. Any other word is an override if its key begins with a section of the config or
    with a group (`train.steps=5`, `model=llama_4m`, `~experiment`, `hydra/launcher=stack`), and an option if it begins
    with a dash (`-m`). Every remaining word is a path, even with an equals sign (`out/lr=0.1/m`, `lr=0.1`).

    Raises:
        UsageError: the operating system cannot look the word up, for example because it is too long.
    """
    try:
        if Path(word).is_dir():
            return True
    except (OSError, ValueError) as error:
        raise UsageError(f"{word[:200]} cannot be looked up ({error}); give the path of a folder") from error
    return not (word.startswith("-") or _is_override(word))


def _is_override(word: str) -> bool:
    from stack.config.check import schema_tree
    from stack.config.recipes import conf_folder, groups_of

    if "=" not in word and not word.startswith("~"):
        return False
    key = word.lstrip("+~").partition("=")[0]
    # Only Hydra's own keys contain a slash.
    first = re.split(r"[./@:]" if key.startswith("hydra") else r"[.@:]", key)[0]
    return first in {"hydra", *schema_tree(), *groups_of(conf_folder())}


def run_and_overrides(verb: str, arguments: Sequence[str], usage: str) -> tuple["RunDir", list[str]]:
    """The run directory given as the first argument of a verb, and the arguments after it.

    Args:
        verb: name of the verb, for messages.
        arguments: the words after the verb.
        usage: the verb's arguments as help shows them, such as `RUN_DIR OUT`.

    Raises:
        UsageError: the first argument is missing or is not the directory of a training run.
    """
    from stack.train.rundir import RunDir

    if not arguments or not is_path(arguments[0]):
        example = usage.replace("RUN_DIR", "runs/NAME/RUN_ID", 1)
        raise UsageError(f"stack {verb} needs a run directory ahead of the overrides; write stack {verb} {example}")
    path, *rest = arguments
    # Symbolic links are resolved, because a folder of checkpoints outside the run directory is named after the real
    # name of the run directory.
    try:
        run = RunDir(Path(path).resolve())
        found = run.config.is_file()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{path[:200]} cannot be looked up ({error}); give the path of a run directory") from error
    if not found or not run.trains:
        what = _what_it_is(run) if found else "no run directory, it has no config.yaml"
        model = ", and no model folder, it has no config.json" if verb == "eval" and not found else ""
        raise UsageError(f"{path} is {what}{model}{_hint(run, verb, rest)}")
    return run, rest


def _what_it_is(run: "RunDir") -> str:
    if run.evaluation.exists():
        return "the directory of an evaluation, not of a training run"
    return "a directory that stack doctor left, not that of a training run"


def _hint(run: "RunDir", verb: str, rest: Sequence[str]) -> str:
    """End of the message: the command with the newest run directory near the given path, if there is one."""
    from stack.train.rundir import RunDir

    near = [run.path.parents[1]] if run.evaluation.exists() and len(run.path.parts) > 2 else []
    below = [file.parent for pattern in ("*/config.yaml", "*/*/config.yaml") for file in run.path.glob(pattern)]
    runs = [path for path in [*near, *below] if (path / "config.yaml").is_file() and RunDir(path).trains]
    if runs:
        # The name of a run directory begins with its start time, so the largest name is the newest run.
        meant = max(runs, key=lambda path: path.name)
        return f"; did you mean {shlex.join(['stack', verb, str(meant), *rest])}?"
    if verb != "eval" and (run.path / "config.json").is_file():
        return "; it is a model folder; to train it: stack train experiment=finetune model.name=FOLDER"
    return "; stack ls lists the run directories"
