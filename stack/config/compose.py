"""Overrides in Hydra's grammar -> Config, and a saved config.yaml -> Config.

Hydra composes the groups of `conf/` and reads the overrides. The tree it composes is left untyped, since a typed node
converts in silence ("5" to 5, 1 to true): `stack.config.check` judges what the user really wrote, and types it.
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

#: Folder beside a run's config.yaml with a copy of what `model.name` named when the run began, without weights.
MODEL_COPY = "model"
#: Keys of `data` that say more about `data.source`.
SOURCE_KEYS = ("paths", "name", "subset", "split", "text_key", "extensions")
_ROTARY = f"{MODEL_FIELDS}.{SECTION}"


def compose(overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Config:
    """The config of a run: `conf/config.yaml`, its groups, then `overrides` in Hydra's grammar.

    `--config-dir DIR` among the overrides adds the groups of a folder: see `stack.config.recipes`. Nobody changes a
    config once it is composed.

    Args:
        values: dotted key -> value, set after the groups and ahead of the overrides of single keys.

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
    """A choice as Hydra is told it: a file by the name under which it was stored."""
    line, value = str(choice.input_line), choice.value()
    if not recipes.is_file_choice(value):
        return line
    return f"{choice.key_or_group}={recipes.store(choice.key_or_group, str(value))}"


def from_yaml(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config that `to_yaml` saved, with single keys overridden; group choices belong to a new run. What is judged
    is the result: an override can mend what the file names and is not there any more.

    Where the folder of `model.name` was moved or deleted, and a copy of it lies beside the file (`MODEL_COPY`), the
    copy takes its place.

    Raises:
        ConfigError: the file cannot be read, is not a config of this schema, or an override is wrong.
    """
    _, known = recipes.find([], recipes.conf_folder())
    parsed = parse(overrides, known.groups)
    for override in parsed:
        if override.key_or_group in known.groups:
            raise ConfigError(f"{override.input_line}: a choice is for a new run; here set its keys one by one")
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
    """The config that `to_yaml` saved, as it is in the file: whether its values fit together, and whether the folders
    that it names are there, is not asked.

    Raises:
        ConfigError: the file cannot be read, or is not a config of this schema.
    """
    tree = yaml_file.load(Path(path), what="the config.yaml of a run")
    # A file that was cut short must not be filled up with defaults.
    if missing := [section for section in schema_tree() if section not in tree]:
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
        # A saved config has none. Resolved, one could put any variable of the environment into an error message.
        raise ConfigError(f"{path}: not a saved config, its {key}={show(value)} is an interpolation")
    return value


def to_yaml(config: Config) -> str:
    """Every key with its value, in the order of the schema; `from_yaml` reads it back equal."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def _typed(tree: DictConfig, overrides: Sequence[Override], *, is_whole: bool = False) -> Config:
    """Apply single keys in order, resolve interpolations, and type the result.

    Args:
        is_whole: whether rotary settings in the tree are all that there are, as in a saved config; otherwise they
            override those of the model folder key by key.
    """
    fields = [override for override in overrides if is_model_field(override)]
    with open_dict(tree):
        for override in overrides:
            if override not in fields:
                _apply(tree, override)
        # `model.name` is known from here on, and with it whose settings the fields change.
        _bring_rotary(tree, fields, is_whole=is_whole)
        for override in fields:
            _apply(tree, override)
    try:
        raw = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}: its interpolation leads nowhere ({why})") from error
    except RecursionError as error:
        raise ConfigError("config: an interpolation in it stands for itself; write the value out") from error
    for override in overrides:
        if "${" in str(override.value()):
            # Before the whole config: what follows from this key would be blamed otherwise.
            path, node = override.key_or_group, node_of(override.key_or_group)
            assert node is not None
            check_fragment(path, _at(raw, path), node)
    return to_config(raw)


def _apply(tree: DictConfig, override: Override) -> None:
    """
    Raises:
        ConfigError: there is nothing to delete, or OmegaConf cannot set it.
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
            # Empty, so that the class takes its own settings.
            OmegaConf.update(tree, path, {}, force_add=True)
        else:
            raise ConfigError(f"{show(override.input_line)}: {path} is not set; drop it")
    except OmegaConfBaseException as error:
        raise ConfigError(f"{show(override.input_line)}: cannot be set ({one_line(error)})") from error


def _bring_rotary(tree: DictConfig, fields: Sequence[Override], *, is_whole: bool) -> None:
    """Puts a model folder's rotary settings below those in the tree, where an override, or a preset, changes some of
    them: the others then stay as the folder has them."""
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
        # Told when the whole config is resolved.
        return None
    return rotary_section(name) if isinstance(name, str) else None


def _at(raw: Any, path: str) -> Any:
    for name in path.split("."):
        raw = raw[name]
    return raw
