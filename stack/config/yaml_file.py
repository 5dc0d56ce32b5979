"""Reads YAML files by unknown authors: parsing time and memory are bounded, and every fault gives a one-line error."""

import io
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from stack.config.values import one_line
from stack.disk import open_regular
from stack.errors import ConfigError

#: Largest size and depth of nesting. A config has about 200 lines, so a larger file is something else.
_MOST_BYTES = 1 << 20
_DEEPEST = 50
#: PyYAML's loader written in C if PyYAML was built with it, otherwise the one written in Python.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load(path: Path, *, what: str) -> DictConfig:
    """Reads a mapping from a YAML file. Interpolations are not resolved.

    Args:
        path: the file.
        what: describes the expected file, for messages.

    Raises:
        ConfigError: the file cannot be read, is not YAML, is not a mapping, is larger than 1 MB, is nested more than 50
            deep, or has aliases.
    """
    text = _text(path, what)
    try:
        _check_events(text)
        tree = OmegaConf.load(io.BytesIO(text))
    # OmegaConf raises OSError if the text is a single value.
    except (YAMLError, OmegaConfBaseException, RecursionError, ValueError, OSError) as error:
        raise ConfigError(f"{path}: not YAML of a config ({first_words(error, path)}); give {what}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}: a list of values and no mapping; give {what}")
    return tree


def check_bounds(path: Path, *, what: str) -> None:
    """Refuses a file that Hydra's loader could read for ever. A file that is not YAML passes, because that loader
    refuses it.

    Args:
        path: the file.
        what: describes the expected file, for messages.

    Raises:
        ConfigError: the file cannot be read, is larger than 1 MB, is nested more than 50 deep, or has aliases.
    """
    try:
        _check_events(_text(path, what))
    except YAMLError:
        return
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML of a config ({error}); give {what}") from error


def first_words(error: Exception, path: Path | None = None) -> str:
    """The fault and its line from an error of YAML or Hydra, without the excerpts and search paths that follow.

    Args:
        error: the error.
        path: the file, if the error does not name it.
    """
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        name = error.problem_mark.name
        place = path if path and name in ("<byte string>", "<unicode string>", "<file>") else name
        return f"{place}, line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return one_line(str(error).partition("Config search path")[0])


def _text(path: Path, what: str) -> bytes:
    try:
        with open_regular(path) as file:
            text = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); give {what}") from error
    if len(text) > _MOST_BYTES:
        raise ConfigError(f"{path}: larger than {_MOST_BYTES >> 20} MB; give {what}")
    return text


def _check_events(text: bytes) -> None:
    """Refuses aliases and deep nesting before any object is built. Nested aliases can take exponential time and memory,
    and deep nesting overflows the stack.

    Raises:
        ValueError: the text is nested too deeply or has an alias.
        YAMLError: the text is not YAML.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {event.start_mark.line + 1}: aliases are not read; write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST:
            raise ValueError(f"line {event.start_mark.line + 1}: nested more than {_DEEPEST} deep")
