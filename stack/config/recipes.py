"""Finds config groups and recipes: in `conf/`, in a folder of the user's (`--config-dir DIR`), or in a single file
(`experiment=mine.yaml`).

The user's folder has subfolders with the names of the groups in `conf/`: `DIR/experiment/mine.yaml` is chosen by
`experiment=mine`.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore

from stack.config import yaml_file
from stack.config.values import closest, show
from stack.errors import ConfigError

FLAG = "--config-dir"
_ENDINGS = (".yaml", ".yml")
#: Groups whose files set keys of the whole config, unless a `# @package` in the first line says otherwise.
_GLOBAL = ("experiment",)
_PACKAGE = re.compile(r"\s*#\s*@package\s+(\S+)")


@dataclass(frozen=True)
class Recipes:
    """The groups that a command line can choose from."""

    own: Path | None
    """Folder of `--config-dir`, absolute."""
    groups: Mapping[str, Sequence[str]]
    """Group -> its choices."""

    @property
    def search_path(self) -> list[str]:
        """The override that adds the user's folder to Hydra's search path, if there is such a folder."""
        if self.own is None:
            return []
        escaped = str(self.own).replace("\\", "\\\\").replace("'", "\\'")
        return [f"hydra.searchpath=['file://{escaped}']"]


def conf_folder() -> Path:
    """The folder of YAML groups: `stack/conf` in an installed wheel, `conf` beside the package in a checkout.

    Raises:
        ConfigError: neither folder exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"{package.parent / 'conf'}: no config.yaml there; install stack again")


def find(lines: Sequence[str], conf: Path) -> tuple[list[str], Recipes]:
    """Takes `--config-dir DIR` out of a command line.

    Args:
        lines: the overrides.
        conf: the folder of `conf_folder`.

    Returns:
        The other overrides, and the groups that they can choose from.

    Raises:
        ConfigError: `--config-dir` is given twice, or its folder does not exist, has no group, has a choice of a name
            that `conf/` has too, or has a file that Hydra's loader could read for ever (aliases, more than 1 MB).
    """
    rest: list[str] = []
    given: list[str] = []
    words = iter(lines)
    for word in words:
        if word == FLAG:
            given.append(next(words, ""))
        elif word.startswith(f"{FLAG}="):
            given.append(word.partition("=")[2])
        else:
            rest.append(word)
    groups = groups_of(conf)
    if not given:
        return rest, Recipes(None, groups)
    if len(given) > 1:
        raise ConfigError(f"{FLAG} {show(given[1])}: {FLAG} is given twice, first as {show(given[0])}; keep one")
    own = _own_folder(given[0])
    return rest, Recipes(own, _merged(own, groups, conf))


def is_file_choice(choice: object) -> bool:
    """Whether a choice of a group is the path of a file."""
    return isinstance(choice, str) and choice.endswith(_ENDINGS)


def store(group: str, choice: str) -> str:
    """Registers a YAML file with Hydra as a choice of `group`, and returns the name of that choice.

    Raises:
        ConfigError: the file cannot be read, or does not hold a mapping.
    """
    path = Path(choice).expanduser().absolute()
    try:
        tree = yaml_file.load(path, what=_what(group))
        head = path.read_text(encoding="utf-8").partition("\n")[0]
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{group}={choice}: {error}") from error
    declared = _PACKAGE.match(head)
    package = declared[1] if declared else "_global_" if group in _GLOBAL else None
    name = f"file-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    ConfigStore.instance().store(group=group, name=name, node=tree, package=package, provider=str(path))
    return name


def _what(group: str) -> str:
    return f"a file with keys of {group}, such as those in {conf_folder() / group}"


def _own_folder(given: str) -> Path:
    folder = Path(given).expanduser().absolute()
    if not given or not folder.is_dir():
        what = "is a file" if folder.is_file() else "no such folder"
        raise ConfigError(f"{FLAG}={show(given)}: {what}; give a folder with groups in it, such as DIR/experiment")
    return folder


def _merged(own: Path, groups: Mapping[str, Sequence[str]], conf: Path) -> dict[str, list[str]]:
    """The choices of each group in both folders. A name in both is refused, because Hydra would silently use conf's."""
    theirs = groups_of(own)
    for group, choices in theirs.items():
        if group in groups:
            for name in choices:
                file = own / group / f"{name}.yaml"
                # Hydra loads it without a bound.
                yaml_file.check_bounds(file, what=_what(group))
                if name in groups[group]:
                    raise ConfigError(f"{FLAG}={own}: {group}={name} is also in {conf}; give {file} another name")
        elif choices and (meant := closest(group, [*groups], cutoff=0.7)):
            raise ConfigError(f"{FLAG}={own}: {own / group} is no group; did you mean {own / meant}?")
    if not any(theirs.get(group) for group in groups):
        raise ConfigError(f"{FLAG}={own}: no group in it has a .yaml file; its folders may be {', '.join(groups)}")
    return {group: sorted([*choices, *theirs.get(group, [])]) for group, choices in groups.items()}


def groups_of(folder: Path) -> dict[str, list[str]]:
    """The groups in `conf/` or in a folder of the user's, with the sorted names of their choices.

    Raises:
        ConfigError: the folder cannot be read.
    """
    try:
        return {
            inner.name: sorted(file.stem for file in inner.glob("*.yaml"))
            for inner in sorted(folder.iterdir())
            if inner.is_dir()
        }
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read ({error.strerror}); give a folder with groups in it") from error


def no_such_choice(line: str, name: str, choices: Sequence[str]) -> ConfigError:
    """The error for a choice that a group does not have.

    Args:
        line: the override, for the message.
        name: the choice in it.
        choices: those that exist.
    """
    meant = closest(name, choices)
    hint = f"did you mean {meant}? " if meant else ""
    return ConfigError(f"{show(line)}: no such choice; {hint}choices are {', '.join(choices)}")
