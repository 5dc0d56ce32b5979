"""Parses overrides in Hydra's grammar and checks each by itself. `stack.config.check` checks the whole config."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from stack.config import recipes
from stack.config.check import Tree, check_fragment, leaves, schema_tree, unknown_key
from stack.config.values import Spec, one_line, show
from stack.errors import ConfigError

MODEL_FIELDS = "model.config"
#: Deepest nesting of brackets in an override. No key needs more, and Hydra's parser overflows the stack on very many.
_DEEPEST = 20


def parse(lines: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[Override]:
    """Parses overrides and checks that each is legal by itself.

    Args:
        lines: overrides as the user wrote them.
        groups: group -> its choices.

    Raises:
        ConfigError: an override is wrong, or sets a key that an earlier one sets; raised for the first such override.
    """
    first: dict[str, str] = {}
    parsed = []
    for line in lines:
        _check_words(line)
        override = parse_line(line)
        key = override.key_or_group
        if key in first:
            raise ConfigError(f"{show(line)}: {key} is given twice, first as {show(first[key])}; keep one")
        first[key] = line
        if override.package is not None:
            raise ConfigError(f"{show(line)}: packages are not used here; drop @{override.package}")
        if key in groups:
            _check_choice(line, override, groups[key])
        else:
            _check_key(line, override, groups)
        parsed.append(override)
    return parsed


def parse_line(line: str) -> Override:
    """Parses one override by Hydra's grammar, without checking its key or value.

    Raises:
        ConfigError: the line is not in Hydra's grammar.
    """
    _check_depth(line)
    try:
        return OverridesParser.create().parse_override(line)
    except (HydraException, ValueError, RecursionError) as error:
        why = f"not in Hydra's grammar ({one_line(error)})"
        raise ConfigError(f"{show(line)}: {why}; quote a special value past the shell: 'key=\"value\"'") from error


def node_of(path: str) -> Spec | Tree | None:
    """The spec of a dotted key, or the tree of a dotted section; None if the schema has no such path."""
    node: Any = schema_tree()
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def is_model_field(override: Override) -> bool:
    """Whether an override sets or deletes a field of `model.config`, or the whole section."""
    return override.key_or_group == MODEL_FIELDS or override.key_or_group.startswith(f"{MODEL_FIELDS}.")


def _check_depth(line: str) -> None:
    """Refuses deeply nested brackets. Brackets inside quotes count too; no legal value has so many."""
    depth = 0
    for char in line:
        depth += (char in "[{(") - (char in "]})")
        if depth > _DEEPEST:
            raise ConfigError(f"{show(line)}: brackets nested more than {_DEEPEST} deep; no key takes such a value")


def _check_words(line: str) -> None:
    """Refuses words that are no overrides. Hydra's parser would report them as incomprehensible token errors."""
    key = re.split("[=@:]", line.lstrip("+~"), maxsplit=1)[0]
    if re.match(r"hydra($|[./])", key):
        raise ConfigError(f"{show(line)}: hydra.* is for a sweep, which stack train -m starts; drop it")
    if line in ("-m", "--multirun"):
        raise ConfigError(f"{line}: only stack train starts a sweep; drop it")
    if line == recipes.FLAG or line.startswith(f"{recipes.FLAG}="):
        raise ConfigError(f"{show(line)}: groups work for a new run only, and this config is saved; drop it")
    if line.startswith("-"):
        raise ConfigError(f"{show(line)}: not an override; write key=value, for example train.steps=200")
    if "=" not in line and not line.startswith("~"):
        spec = dict(leaves(schema_tree())).get(key)
        example = f"{key}={show(spec.example)}" if spec else "train.steps=200"
        raise ConfigError(f"{show(line)}: not an override; write key=value, for example {example}")


def _check_choice(line: str, override: Override, choices: Sequence[str]) -> None:
    group, listed = override.key_or_group, ", ".join(choices)
    if override.is_add() or override.is_force_add():
        raise ConfigError(f"{show(line)}: {group} has a choice already; drop the +")
    if override.is_delete():
        if override.value() is not None:
            raise ConfigError(f"{show(line)}: write ~{group} to compose without it")
        return
    if override.is_sweep_override() or isinstance(override.value(), dict | list):
        sweep = "; add -m to stack train for a sweep" if override.is_sweep_override() else ""
        raise ConfigError(
            f"{show(line)}: {group} takes one choice; set its keys one by one, or choose among {listed}{sweep}"
        )
    if override.value() is None:
        raise ConfigError(f"{show(line)}: write ~{group} to compose without it; choices are {listed}")
    name = show(override.value())
    if not recipes.is_file_choice(override.value()) and name not in choices:
        raise recipes.no_such_choice(line, name, choices)


def _check_key(line: str, override: Override, groups: Mapping[str, Sequence[str]]) -> None:
    path = override.key_or_group
    node = node_of(path)
    if node is None:
        unknown_key(path, show(line), groups)
    if override.is_sweep_override():
        hint = f"or write {path}=[{line.partition('=')[2]}]" if _is_bare_list(override, node) else "or give one value"
        raise ConfigError(
            f"{show(line)}: several values are a sweep, and this is one run; add -m to stack train, {hint}"
        )
    if override.is_delete():
        if not path.startswith(f"{MODEL_FIELDS}.") or override.value() is not None:
            raise ConfigError(f"{show(line)}: only ~model.config.KEY can be deleted; write {path}=VALUE to change it")
        return
    if override.is_add() and not path.startswith(f"{MODEL_FIELDS}."):
        raise ConfigError(f"{show(line)}: {path} exists already; drop the +")
    value = override.value()
    # An interpolation can be resolved and checked only after all groups and overrides are composed.
    if "${" not in str(value):
        check_fragment(path, value, node)


def _is_bare_list(override: Override, node: Spec | Tree) -> bool:
    """Whether an override looks like a list without its brackets, such as `data.paths=a,b`."""
    sweep = override.value()
    if not isinstance(node, Spec) or not node.is_list or not isinstance(sweep, ChoiceSweep):
        return False
    return not any(isinstance(value, list | dict) for value in sweep.list)
