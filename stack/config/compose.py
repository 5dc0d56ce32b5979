"""Makes a `Config` from overrides in Hydra's grammar, or from the config.yaml of a run.

Hydra composes the groups of `conf/` and reads the overrides. Its tree is left untyped, because typed nodes convert
values silently ("5" to 5, 1 to true). `stack.config.check` then checks and types what the user wrote.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from stack.config import recipes, yaml_file
from stack.config.check import check_fragment, schema_tree, to_config, typed
from stack.config.model_folder import base_fields, check_weights, is_copy, rotary_section
from stack.config.overrides import MODEL_FIELDS, is_model_field, node_of, parse
from stack.config.rotary import SECTION
from stack.config.schema import Config, Data
from stack.config.values import one_line, show
from stack.errors import ConfigError

#: Folder beside a run's config.yaml: a copy, without weights, of the model folder that `model.name` named at the start.
MODEL_COPY = "model"
#: Keys of `data` that describe the source named by `data.source`.
SOURCE_KEYS = ("paths", "name", "subset", "split", "text_key", "extensions")
_ROTARY = f"{MODEL_FIELDS}.{SECTION}"


def compose(overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Config:
    """Composes the config of a run from `conf/config.yaml`, its groups and the overrides, in this order.

    Args:
        overrides: lines in Hydra's grammar. `--config-dir DIR` among them adds the groups of a folder: see
            `stack.config.recipes`.
        values: dotted key -> value, set after the groups and before the overrides of single keys.

    Returns:
        The config; callers must not modify it.

    Raises:
        ConfigError: an override or a file of `conf/` is wrong; the message is one line.
    """
    conf = recipes.conf_folder()
    lines, known = recipes.find(overrides, conf)
    parsed = parse(lines, known.groups)
    choices = [override for override in parsed if override.key_or_group in known.groups]
    hydras = [_hydras(override) for override in choices]
    ConfigStore.instance().store(name="schema", node=asdict(Config()))
    try:
        with initialize_config_dir(str(conf), job_name="stack", version_base="1.3"):
            tree = hydra_compose("config", overrides=[*hydras, *known.search_path])
    except (HydraException, OmegaConfBaseException, YAMLError, RecursionError, ValueError) as error:
        shown = " ".join(str(override.input_line) for override in choices)
        raise ConfigError(f"{shown or conf}: {yaml_file.first_words(error)}") from error
    with open_dict(tree):
        for key, value in (values or {}).items():
            OmegaConf.update(tree, key, value, force_add=True)
    return _typed(tree, [override for override in parsed if override.key_or_group not in known.groups])


def _hydras(choice: Override) -> str:
    """A group choice in the form for Hydra: a file is replaced by the name under which `recipes.store` stored it."""
    line, value = str(choice.input_line), choice.value()
    if not recipes.is_file_choice(value):
        return line
    return f"{choice.key_or_group}={recipes.store(choice.key_or_group, str(value))}"


def from_yaml(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads the config that `to_yaml` saved, and overrides single keys. Only the result is checked, so an override can
    replace the path of a file that no longer exists.

    If the folder of `model.name` was moved or deleted, its copy beside the file (`MODEL_COPY`) takes its place.

    Args:
        path: a run's config.yaml.
        overrides: single keys in Hydra's grammar; group choices are refused.

    Raises:
        ConfigError: the file cannot be read or is not a config of this schema, or an override is wrong.
    """
    _, known = recipes.find([], recipes.conf_folder())
    parsed = parse(overrides, known.groups)
    for override in parsed:
        if override.key_or_group in known.groups:
            raise ConfigError(
                f"{override.input_line}: a group choice works for a new run only; set its keys one by one"
            )
    tree = OmegaConf.create(asdict(as_saved(path)))
    given = {override.key_or_group for override in parsed}
    if "data.source" in given:
        _drop_other_source(tree, parsed)
    if "model.name" not in given:
        _stand_in(tree, Path(path).parent / MODEL_COPY)
    try:
        return _typed(tree, parsed, is_whole=True)
    except ConfigError as error:
        if parsed:
            raise
        raise ConfigError(f"{path}: {error}") from error


def as_saved(path: str | Path) -> Config:
    """Reads the config that `to_yaml` saved, and checks each value by itself only. Contradictions between values and
    missing folders are not errors here.

    Raises:
        ConfigError: the file cannot be read or is not a config of this schema.
    """
    tree = yaml_file.load(Path(path), what="the config.yaml of a run")
    # Without this check a truncated file would silently be completed with defaults.
    if missing := [section for section in schema_tree() if section not in tree]:
        raise ConfigError(f"{path}: not a whole saved config; it lacks {', '.join(missing)}")
    try:
        return typed(OmegaConf.to_container(tree))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _drop_other_source(tree: DictConfig, overrides: Sequence[Override]) -> None:
    """Resets the keys that describe the saved data source if an override changes `data.source`. The `data.paths` of one
    source are illegal for another."""
    source = next(override.value() for override in overrides if override.key_or_group == "data.source")
    if source != tree.data.source:
        default = asdict(Data())
        for key in SOURCE_KEYS:
            tree.data[key] = default[key]


def _stand_in(tree: DictConfig, copy: Path) -> None:
    """Sets `model.name` to the run's copy of its model folder if the folder was moved or deleted. The copy has no
    weights. Resume, export and evaluation take the weights from a checkpoint and need the config fields only."""
    if not is_copy(copy):
        return
    try:
        base_fields(tree.model.name)
        # A hub name is not checked: its files may not be in this host's cache yet.
        if tree.model.init == "pretrained" and (folder := Path(tree.model.name).expanduser()).exists():
            check_weights(tree.model.name, folder)
    except ConfigError:
        tree.model.name = str(copy)


def saved_value(path: str | Path, key: str) -> str | None:
    """Reads one value of a saved config. The rest of the file is not checked.

    Args:
        path: a run's config.yaml.
        key: a dotted key whose value is text or null.

    Raises:
        ConfigError: the file cannot be read, lacks the key, or has a value of another type or an interpolation there.
    """
    tree = yaml_file.load(Path(path), what="the config.yaml of a run")
    try:
        value: Any = OmegaConf.to_container(tree)
        for name in key.split("."):
            value = value[name]
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{path}: not a saved config, it has no {key}") from error
    if not isinstance(value, str | None):
        raise ConfigError(f"{path}: not a saved config, its {key}={show(value)} is no text")
    if value is not None and "${" in value:
        # `to_yaml` writes no interpolations. A hostile file could use one to put an environment variable, perhaps a
        # secret, into an error message.
        raise ConfigError(f"{path}: not a saved config, its {key}={show(value)} is an interpolation")
    return value


def to_yaml(config: Config) -> str:
    """The config as YAML: every key with its value, in the order of the schema. `from_yaml` reads it back unchanged."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def _typed(tree: DictConfig, overrides: Sequence[Override], *, is_whole: bool = False) -> Config:
    """Applies overrides of single keys in order, resolves interpolations, and checks and types the result.

    Args:
        tree: the composed groups, or a saved config; modified.
        overrides: overrides of single keys.
        is_whole: whether the rotary settings in the tree are complete, as in a saved config. Otherwise they override
            the settings of the model folder key by key.
    """
    fields = [override for override in overrides if is_model_field(override)]
    with open_dict(tree):
        for override in overrides:
            if override not in fields:
                _apply(tree, override)
        # After the loop, because overrides of the rotary settings start from those of the final `model.name`.
        _bring_rotary(tree, fields, is_whole=is_whole)
        for override in fields:
            _apply(tree, override)
    try:
        raw = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}: its interpolation cannot be resolved ({why})") from error
    except RecursionError as error:
        raise ConfigError("config: an interpolation in it refers to itself; write the value out") from error
    for override in overrides:
        if "${" in str(override.value()):
            # Checked before the whole config, so that the message names this key and not one that depends on it.
            path, node = override.key_or_group, node_of(override.key_or_group)
            assert node is not None
            check_fragment(path, _at(raw, path), node)
    return to_config(raw)


def _apply(tree: DictConfig, override: Override) -> None:
    """Sets or deletes one key in the tree.

    Raises:
        ConfigError: the key to delete is not set, or OmegaConf cannot set the value.
    """
    path = override.key_or_group
    try:
        if not override.is_delete():
            OmegaConf.update(tree, path, override.value(), merge=True, force_add=True)
            return
        section, _, key = path.rpartition(".")
        parent = OmegaConf.select(tree, section)
        if parent is not None and key in parent:
            del parent[key]
        elif path == _ROTARY and _folder_rotary(tree):
            # An empty section replaces the folder's settings, so that the model class uses its defaults.
            OmegaConf.update(tree, path, {}, force_add=True)
        else:
            raise ConfigError(f"{show(override.input_line)}: {path} is not set; drop it")
    except OmegaConfBaseException as error:
        raise ConfigError(f"{show(override.input_line)}: cannot be set ({one_line(error)})") from error


def _bring_rotary(tree: DictConfig, fields: Sequence[Override], *, is_whole: bool) -> None:
    """Merges the rotary settings of the model folder into the tree if a preset or an override sets some of them. Keys
    that neither sets keep the folder's values."""
    own = OmegaConf.select(tree, _ROTARY)
    if own is None and not any(_sets_rotary(override) for override in fields):
        return
    if own is not None and is_whole:
        return
    if theirs := _folder_rotary(tree):
        OmegaConf.update(tree, _ROTARY, OmegaConf.merge(theirs, own or {}), merge=False, force_add=True)


def _sets_rotary(override: Override) -> bool:
    path, value = override.key_or_group, override.value()
    if path == MODEL_FIELDS:
        return isinstance(value, dict) and SECTION in value
    return path.startswith(f"{_ROTARY}.") or (path == _ROTARY and not override.is_delete())


def _folder_rotary(tree: DictConfig) -> dict[str, Any] | None:
    try:
        name = OmegaConf.select(tree, "model.name")
    except OmegaConfBaseException:
        # `_typed` reports the error when it resolves the whole config.
        return None
    return rotary_section(name) if isinstance(name, str) else None


def _at(raw: Any, path: str) -> Any:
    for name in path.split("."):
        raw = raw[name]
    return raw
