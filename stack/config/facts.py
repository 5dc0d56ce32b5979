"""The file stack.yaml in an exported folder: on which text, and how, the run of the folder was evaluated."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from stack.config import yaml_file
from stack.config.check import check_fragment
from stack.config.compose import SOURCE_KEYS, node_of
from stack.config.schema import Config
from stack.errors import ConfigError

#: Name of the file in an exported folder.
FACTS = "stack.yaml"
#: Keys that a later evaluation takes from the file. None of them can name a folder to write to or a host to contact.
DEFINING = (
    *(f"data.{key}" for key in ("source", *SOURCE_KEYS, "special_tokens", "seq_len", "pack")),
    *("data.heldout_fraction", "data.split_seed"),
    *("model.attention", "precision.dtype", "train.eval_sequences"),
)
#: Keys that tell where the prepared corpus of the run may still be. An evaluation only reads it there.
CORPUS = ("data.root", "data.tokenizer", "data.vocab_size")


def facts(cfg: Config) -> str:
    """The YAML text of the file `FACTS` for the export of a run with the config `cfg`."""
    tree: dict[str, dict[str, Any]] = {}
    for section, name in _parts():
        tree.setdefault(section, {})[name] = getattr(getattr(cfg, section), name)
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def read_facts(path: Path) -> dict[str, Any]:
    """Reads the known keys of a file `FACTS`, which may come from an unknown author. Other keys are ignored.

    Returns:
        Dotted key -> checked value.

    Raises:
        ConfigError: the file cannot be read, or a value is not legal for its key.
    """
    tree = OmegaConf.to_container(yaml_file.load(path, what="what stack export writes there"))
    assert isinstance(tree, dict)
    found = {}
    for section, name in _parts():
        values, key = tree.get(section), f"{section}.{name}"
        if not isinstance(values, Mapping) or name not in values:
            continue
        node = node_of(key)
        assert node is not None
        try:
            # `check_fragment` also refuses interpolations. One could send an environment variable to a server as part
            # of a dataset's name.
            found[key] = check_fragment(key, values[name], node)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return found


def _parts() -> Iterator[tuple[str, str]]:
    """The section and the name of each key of the file."""
    for key in (*DEFINING, *CORPUS):
        section, _, name = key.partition(".")
        yield section, name
