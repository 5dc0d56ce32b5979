"""Which words after a verb are paths, and which run a path means."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stack.errors import UsageError

if TYPE_CHECKING:
    from stack.train.rundir import RunDir


def is_path(word: str) -> bool:
    """Whether a word names a folder and is no override.

    A folder that exists is a path whatever its name. Else a word is an override where it sets a key of a section of the
    config, or chooses in a group (`train.steps=5`, `model=llama_4m`, `~experiment`, `hydra/launcher=stack`), or is an
    option (`-m`). All else is a path, also with an equals sign in it (`out/lr=0.1/m`, `lr=0.1`).

    Raises:
        UsageError: no file system can look such a name up.
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
    # Of all keys only Hydra's own have a slash.
    first = re.split(r"[./@:]" if key.startswith("hydra") else r"[.@:]", key)[0]
    return first in {"hydra", *schema_tree(), *groups_of(conf_folder())}


def run_and_overrides(verb: str, arguments: Sequence[str], usage: str) -> tuple["RunDir", list[str]]:
    """The run that a verb is about, and what follows it.

    Args:
        usage: of the verb's arguments, such as `RUN_DIR OUT`.

    Raises:
        UsageError: the first argument is no run directory.
    """
    from stack.train.rundir import RunDir

    if not arguments or not is_path(arguments[0]):
        example = usage.replace("RUN_DIR", "runs/NAME/RUN_ID", 1)
        raise UsageError(f"stack {verb} needs a run directory ahead of the overrides; write stack {verb} {example}")
    path, *rest = arguments
    # Resolved: checkpoints may be kept elsewhere by the name that the folder really has.
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
    return "an evaluation, and no run" if run.evaluation.exists() else "what stack doctor left, and no run"


def _hint(run: "RunDir", verb: str, rest: Sequence[str]) -> str:
    """A run that may be meant, as the command to type."""
    from stack.train.rundir import RunDir

    near = [run.path.parents[1]] if run.evaluation.exists() and len(run.path.parts) > 2 else []
    below = [file.parent for pattern in ("*/config.yaml", "*/*/config.yaml") for file in run.path.glob(pattern)]
    runs = [path for path in [*near, *below] if (path / "config.yaml").is_file() and RunDir(path).trains]
    if runs:
        # Names of run directories begin with the time.
        meant = max(runs, key=lambda path: path.name)
        return f"; did you mean {shlex.join(['stack', verb, str(meant), *rest])}?"
    if verb != "eval" and (run.path / "config.json").is_file():
        return "; it is a model folder: stack train model=folder model.name=FOLDER model.init=pretrained begins with it"
    return "; the path of a run is what stack train prints first"
