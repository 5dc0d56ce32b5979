"""What an exported folder says about the evaluation of the run that it is from."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from stack.config import yaml_file
from stack.config.check import check_fragment
from stack.config.compose import SOURCE_KEYS, node_of
from stack.config.schema import Config
from stack.errors import ConfigError

#: In an exported folder: on which text, how cut and how computed its run was evaluated.
FACTS = "stack.yaml"
#: What of it a later evaluation takes. No key here says where to write or which host to reach.
DEFINING = (
    *(f"data.{key}" for key in ("source", *SOURCE_KEYS, "special_tokens", "seq_len", "pack")),
    *("data.heldout_fraction", "data.split_seed"),
    *("model.attention", "precision.dtype", "train.eval_sequences"),
)
#: What says where a corpus of the same text may lie already. It is read there, and not written.
CORPUS = ("data.root", "data.tokenizer", "data.vocab_size")


def facts(cfg: Config) -> str:
    """The text of `FACTS` for a folder that is exported from a run of `cfg`."""
    tree: dict[str, dict[str, Any]] = {}
    for section, name in _parts():
        tree.setdefault(section, {})[name] = getattr(getattr(cfg, section), name)
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def read_facts(path: Path) -> dict[str, Any]:
    """Of a file that may come from anywhere the facts alone, by their dotted keys, each checked.

    Raises:
        ConfigError: it cannot be read, or a fact has a value that its key does not allow.
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
            # Refuses interpolations too: one could put a variable of the environment into the name of a data set.
            found[key] = check_fragment(key, values[name], node)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return found


def _parts() -> Iterator[tuple[str, str]]:
    """Section and name of each key."""
    for key in (*DEFINING, *CORPUS):
        section, _, name = key.partition(".")
        yield section, name
