"""Overrides in Hydra's grammar -> Config, and a saved config.yaml -> Config.

Hydra composes the groups of `conf/` and reads the overrides. The tree it composes is left untyped, since a typed node
converts in silence ("5" to 5, 1 to true): `stack.config.check` judges what the user really wrote, and types it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from stack.config.check import Tree, check_fragment, leaves, schema_tree, to_config, typed, unknown_key
from stack.config.families import base_fields
from stack.config.model_folder import check_weights, is_copy
from stack.config.schema import Config, Data
from stack.config.values import Spec, closest, one_line, show
from stack.errors import ConfigError

#: Folder beside a run's config.yaml with a copy of what `model.name` named when the run began, without weights.
MODEL_COPY = "model"
#: Keys of `data` that say more about `data.source`.
SOURCE_KEYS = ("paths", "name", "subset", "split", "text_key", "extensions")


def compose(overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Config:
    """The config of a run: `conf/config.yaml`, its groups, then `overrides` in Hydra's grammar.

    Args:
        values: dotted key -> value, set after the groups and ahead of the overrides of single keys.

    Nobody changes a config once it is composed.

    Raises:
        ConfigError: an override or a file of `conf/` is wrong; the message is one line.
    """
    conf = conf_folder()
    groups = groups_of(conf)
    parsed = _parse(overrides, groups)
    choices = [str(override.input_line) for override in parsed if override.key_or_group in groups]
    ConfigStore.instance().store(name="schema", node=asdict(Config()))
    try:
        with initialize_config_dir(str(conf), job_name="stack", version_base="1.3"):
            tree = hydra_compose("config", overrides=choices)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{' '.join(choices) or conf}: {_first_words(error)}") from error
    with open_dict(tree):
        for key, value in (values or {}).items():
            OmegaConf.update(tree, key, value, force_add=True)
    return _typed(tree, [override for override in parsed if override.key_or_group not in groups])


def from_yaml(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config that `to_yaml` saved, with single keys overridden; group choices belong to a new run. What is judged
    is the result: an override can mend what the file names and is not there any more.

    Where the folder of `model.name` was moved or deleted, and a copy of it lies beside the file (`MODEL_COPY`), the
    copy takes its place.

    Raises:
        ConfigError: the file cannot be read, is not a config of this schema, or an override is wrong.
    """
    groups = groups_of(conf_folder())
    parsed = _parse(overrides, groups)
    for override in parsed:
        if override.key_or_group in groups:
            raise ConfigError(f"{override.input_line}: a choice is for a new run; here set its keys one by one")
    tree = OmegaConf.create(asdict(as_saved(path)))
    given = {override.key_or_group for override in parsed}
    if "data.source" in given:
        _drop_other_source(tree, parsed)
    if "model.name" not in given:
        _stand_in(tree, Path(path).parent / MODEL_COPY)
    try:
        return _typed(tree, parsed)
    except ConfigError as error:
        if parsed:
            raise
        raise ConfigError(f"{path}: {error}") from error


def as_saved(path: str | Path) -> Config:
    """The config that `to_yaml` saved, as it is in the file: whether its values fit together, and whether the folders
    that it names are there, is not asked.

    Raises:
        ConfigError: the file cannot be read, or is not a config of this schema.
    """
    try:
        tree = OmegaConf.load(path)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"{path}: cannot be read ({why}); give the config.yaml of a run") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a saved config ({_first_words(error)})") from error
    # A file that was cut short must not be filled up with defaults.
    missing = [section for section in schema_tree() if section not in tree]
    if missing or not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}: not a whole saved config; it lacks {', '.join(missing)}")
    try:
        return typed(OmegaConf.to_container(tree))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _drop_other_source(tree: DictConfig, overrides: Sequence[Override]) -> None:
    """Takes away what the saved config says about its source where an override names another one: `data.paths` of one
    source mean nothing to the next, and are refused there."""
    source = next(override.value() for override in overrides if override.key_or_group == "data.source")
    if source != tree.data.source:
        default = asdict(Data())
        for key in SOURCE_KEYS:
            tree.data[key] = default[key]


def _stand_in(tree: DictConfig, copy: Path) -> None:
    """Puts the run's own copy of its model folder in the place of a folder that was moved or deleted. A run that goes
    on, is exported or evaluated takes the weights from a checkpoint, and needs the fields alone."""
    if not is_copy(copy):
        return
    try:
        base_fields(tree.model.name)
        # Of a hub's model nothing may be in this host's cache yet.
        if tree.model.init == "pretrained" and (folder := Path(tree.model.name).expanduser()).exists():
            check_weights(tree.model.name, folder)
    except ConfigError:
        tree.model.name = str(copy)


def saved_value(path: str | Path, key: str) -> str | None:
    """One value, text or null, of a saved config by its dotted key, whatever else is in the file.

    Raises:
        ConfigError: the file cannot be read, or lacks it.
    """
    try:
        value: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        for name in key.split("."):
            value = value[name]
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{path}: not a saved config, it has no {key}") from error
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a saved config ({_first_words(error)})") from error
    if not isinstance(value, str | None):
        raise ConfigError(f"{path}: not a saved config, its {key}={show(value)} is no text")
    return value


def to_yaml(config: Config) -> str:
    """Every key with its value, in the order of the schema; `from_yaml` reads it back equal."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def conf_folder() -> Path:
    """The folder of YAML groups: `stack/conf` in an installed wheel, `conf` beside the package in a checkout.

    Raises:
        ConfigError: there is neither.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"{package.parent / 'conf'}: no config.yaml there; install stack again")


def _first_words(error: Exception) -> str:
    """What is wrong and where, without the excerpts and search paths that follow."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}"
    return one_line(str(error).partition("Config search path")[0])


def groups_of(conf: Path) -> dict[str, list[str]]:
    """Group -> its choices."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in conf.iterdir() if folder.is_dir()
    }


def _parse(lines: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[Override]:
    """The overrides, each judged alone; what only the whole config can tell is left to `to_config`."""
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
    """One override by Hydra's grammar alone.

    Raises:
        ConfigError: it is not in that grammar.
    """
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException as error:
        why = f"not in Hydra's grammar ({one_line(error)})"
        raise ConfigError(f"{show(line)}: {why}; quote a special value past the shell: 'key=\"value\"'") from error


def _check_words(line: str) -> None:
    """Refuse what is not an override at all before Hydra's grammar calls it a token error."""
    key = re.split("[=@:]", line.lstrip("+~"), maxsplit=1)[0]
    if re.match(r"hydra($|[./])", key):
        raise ConfigError(f"{show(line)}: hydra.* is for a sweep, which stack train -m starts; drop it")
    if line in ("-m", "--multirun"):
        raise ConfigError(f"{line}: only stack train starts a sweep; drop it")
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
            f"{show(line)}: {group} takes one choice, its keys come one by one; choices are {listed}{sweep}"
        )
    if override.value() is None:
        raise ConfigError(f"{show(line)}: write ~{group} to compose without it; choices are {listed}")
    name = show(override.value())
    if name not in choices:
        meant = closest(name, choices)
        hint = f"did you mean {meant}? " if meant else ""
        raise ConfigError(f"{show(line)}: no such choice; {hint}choices are {listed}")


def _check_key(line: str, override: Override, groups: Mapping[str, Sequence[str]]) -> None:
    path = override.key_or_group
    node = node_of(path)
    if node is None:
        unknown_key(path, show(line), groups)
    if override.is_sweep_override():
        is_list = isinstance(node, Spec) and node.is_list
        hint = f"or write {path}=[{line.partition('=')[2]}]" if is_list else "or give one value"
        raise ConfigError(
            f"{show(line)}: several values are a sweep, and this is one run; add -m to stack train, {hint}"
        )
    in_model = path.startswith("model.config.")
    if override.is_delete():
        if not in_model or override.value() is not None:
            raise ConfigError(f"{show(line)}: only ~model.config.KEY can be deleted; write {path}=VALUE to change it")
        return
    if override.is_add() and not in_model:
        raise ConfigError(f"{show(line)}: {path} exists already; drop the +")
    value = override.value()
    # What an interpolation stands for is known once everything is composed.
    if "${" not in str(value):
        check_fragment(path, value, node)


def node_of(path: str) -> Spec | Tree | None:
    """What the schema has at a dotted key; None where there is no such key."""
    node: Any = schema_tree()
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def _typed(tree: DictConfig, overrides: Sequence[Override]) -> Config:
    """Apply single keys in order, resolve interpolations, and type the result."""
    with open_dict(tree):
        for override in overrides:
            try:
                _apply(tree, override)
            except OmegaConfBaseException as error:
                raise ConfigError(f"{show(override.input_line)}: cannot be set ({one_line(error)})") from error
    try:
        raw = OmegaConf.to_container(tree, resolve=True)
    except InterpolationResolutionError as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}: its interpolation leads nowhere ({why})") from error
    return to_config(raw)


def _apply(tree: DictConfig, override: Override) -> None:
    path = override.key_or_group
    if not override.is_delete():
        OmegaConf.update(tree, path, override.value(), merge=True, force_add=True)
        return
    section, _, key = path.rpartition(".")
    parent = OmegaConf.select(tree, section)
    if parent is None or key not in parent:
        raise ConfigError(f"{show(override.input_line)}: {path} is not set; drop it")
    del parent[key]
