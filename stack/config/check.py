"""Turns a tree of plain values into a `Config` and checks it. Overrides and saved configs are checked by the same code,
so that a mistake gives the same message wherever it is made."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from stack.config.auto import warmup_steps, without_auto
from stack.config.families import FAMILIES
from stack.config.kernels import check_kernels
from stack.config.model_fields import Tree, check_fields, union
from stack.config.model_folder import base_fields, check_weights, is_copy, model_fields
from stack.config.places import settled
from stack.config.rotary import SECTION, check_rope
from stack.config.schema import Config
from stack.config.values import Spec, check_value, closest_path, refuse, show, spec_of
from stack.errors import ConfigError

_FIELDS = "model.config."
#: Fields that determine the shapes of parameters. With model.init=pretrained they must be those of the weights.
_SHAPING = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "n_inner",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "attention_bias",
    "mlp_bias",
    "use_qk_norm",
)
_T = TypeVar("_T")


def to_config(raw: Any) -> Config:
    """Builds and checks a config from a tree of values. Missing keys take the schema's defaults.

    Args:
        raw: nested mappings of plain values, as YAML gives them.

    Raises:
        ConfigError: a key is unknown, a value is not legal for its key, or two values contradict each other.
    """
    config = typed(raw)
    for rule in _MODEL_RULES:
        rule(config)
    # After the rules about the model, because the values of `auto` depend on the model.
    config = without_auto(config)
    for rule in _RULES:
        rule(config)
    return config


def typed(raw: Any) -> Config:
    """Builds a config as `to_config` does, but checks each value by itself only. Contradictions between values and
    missing model folders are not errors here.

    Raises:
        ConfigError: a key is unknown, or a value is not legal for its key.
    """
    return _build(Config, _check_section("", raw, schema_tree()))


@cache
def schema_tree() -> Tree:
    """Every legal key as a tree: the keys of the schema, with the fields of all families under `model.config`."""
    tree = _tree_of(Config)
    tree["model"]["config"] = union(family.fields for family in FAMILIES.values())
    return tree


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Spec]]:
    """The dotted path and the spec of every key in a tree that is not a section."""
    for key, node in tree.items():
        if isinstance(node, Spec):
            yield prefix + key, node
        else:
            yield from leaves(node, f"{prefix}{key}.")


def check_fragment(path: str, value: Any, node: Spec | Tree) -> Any:
    """Checks a value for the key or section at `path`, and returns it in the type of its field.

    Raises:
        ConfigError: a key is unknown, or a value is not legal for its key.
    """
    return check_value(path, value, node) if isinstance(node, Spec) else _check_section(path, value, node)


def unknown_key(path: str, shown: str, groups: Iterable[str] = ()) -> NoReturn:
    """Raises the ConfigError for a dotted path that does not exist.

    Args:
        path: the dotted path.
        shown: the override or value as the user wrote it.
        groups: names of groups, which are also suggested if they are similar to `path`.
    """
    tree = schema_tree()
    meant = _renamed(path) or closest_path(path, [*(leaf for leaf, _ in leaves(tree)), *groups])
    if meant:
        raise ConfigError(f"{shown}: no such key; did you mean {meant}?")
    section: Any = tree
    known: list[str] = []
    for part in path.split("."):
        if not isinstance(section, Mapping) or part not in section:
            break
        section = section[part]
        known.append(part)
    if isinstance(section, Spec):
        raise ConfigError(f"{shown}: no such key; {'.'.join(known)} is a single value")
    if path.startswith(_FIELDS):
        raise ConfigError(f"{shown}: no such key; no family has it")
    where = f"the keys of {'.'.join(known)}" if known else "the sections"
    raise ConfigError(f"{shown}: no such key; {where} are {', '.join(section)}")


def _renamed(path: str) -> str | None:
    """The key in `model.config` for a name that only config.json files use, such as GPT-2's `n_embd`."""
    key = path.removeprefix(_FIELDS)
    aliases = {old: new for family in FAMILIES.values() for old, new in family.aliases.items()}
    return f"{_FIELDS}{aliases[key]}" if key in aliases and key not in schema_tree()["model"]["config"] else None


def _tree_of(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    tree: dict[str, Any] = {}
    for field in fields(cls):
        hint = hints[field.name]
        if is_dataclass(hint):
            tree[field.name] = _tree_of(hint)
        elif hint == dict[str, Any]:
            tree[field.name] = {}
        else:
            tree[field.name] = spec_of(field, hint)
    return tree


def _check_section(path: str, raw: Any, tree: Tree) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        refuse(path or "config", raw, f"it is a section, not a value; its keys are {', '.join(tree)}")
    checked = {}
    for key, value in raw.items():
        inner = f"{path}.{key}" if path else str(key)
        if key not in tree:
            unknown_key(inner, f"{inner}={show(value)}")
        checked[key] = check_fragment(inner, value, tree[key])
    return checked


def _build(cls: type[_T], values: Mapping[str, Any]) -> _T:
    hints = get_type_hints(cls)
    return cls(
        **{key: _build(hints[key], value) if is_dataclass(hints[key]) else value for key, value in values.items()}
    )


def _place_rules(config: Config) -> None:
    # Called for its errors only. The paths stay as the user wrote them until a run directory is created.
    settled(config)


def _run_rules(config: Config) -> None:
    name = config.run.name
    if "/" in name or "\\" in name:
        without = re.sub(r"[/\\]+", "-", name).strip("-. ") or "run"
        refuse("run.name", name, f"a folder name cannot contain a slash; for example {without}")
    if name.startswith((".", "-")) or name != name.strip() or len(os.fsencode(name)) > 200:
        why = "must be a folder name of at most 200 bytes, not begun by a dot or a dash, with no space at its ends"
        refuse("run.name", name, f"{why}; for example run-1")
    if not _is_utf8(name):
        refuse("run.name", name, "must be UTF-8, since it is also a name in files and in W&B; for example run-1")


def _is_utf8(text: str) -> bool:
    """Whether a command line argument was valid UTF-8. Python keeps invalid bytes of arguments as surrogates."""
    return not any(0xD800 <= ord(char) <= 0xDFFF for char in text)


def _model_rules(config: Config) -> None:
    fields = base_fields(config.model.name)
    name = fields["model_type"]
    family = FAMILIES[name]
    check_fields(config.model.config, family.fields, name)
    given = {**family.defaults, **model_fields(config.model)}
    check_rope(config.model.config.get(SECTION, {}), _head_dim(given))
    if config.model.attention == "flash_attention_2" and config.precision.dtype == "fp32":
        why = "its kernels have no fp32; add precision=bf16, or use model.attention=sdpa"
        refuse("model.attention", config.model.attention, why)
    if config.model.attention == "sdpa" and not family.sdpa:
        refuse(
            "model.attention", "sdpa", f"{name} caps its attention logits, which sdpa cannot; use model.attention=eager"
        )
    # A model with rotary embeddings accepts sequences beyond the max_position_embeddings of its folder. A model with a
    # table of learned positions does not.
    longest = (config.model.config if family.rotary else given).get("max_position_embeddings")
    if longest is not None and config.data.seq_len > longest:
        why = f"longer than model.config.max_position_embeddings={longest}; at most {longest}"
        refuse("data.seq_len", config.data.seq_len, why)


def _head_dim(given: Mapping[str, Any]) -> int:
    """Width of an attention head. The planner checks that the heads divide the model's width."""
    return given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]


def _pretrained_rules(config: Config) -> None:
    model = config.model
    if model.init == "scratch":
        return
    if model.name in FAMILIES:
        where = f"./{model.name} for the folder" if Path(model.name).is_dir() else "a model folder"
        why = f"model.name={model.name} is a family, and has no weights; give it {where}, or use scratch"
        refuse("model.init", model.init, why)
    fields = base_fields(model.name)
    if "quantization_config" in fields:
        refuse("model.name", model.name, "its weights are quantized; give the folder that they were made from")
    # The weights of a hub model may not be downloaded yet. A copy in a run directory has no weights: the run's
    # checkpoints have them.
    if (folder := Path(model.name).expanduser()).exists() and not is_copy(folder):
        check_weights(model.name, folder)
    for key in _SHAPING:
        theirs = {**FAMILIES[fields["model_type"]].defaults, **fields}.get(key)
        if theirs is not None and model.config.get(key, theirs) != theirs:
            why = f"the weights of model.name={model.name} have {show(theirs)}; drop it (model=folder has no preset)"
            refuse(f"{_FIELDS}{key}", model.config[key], why)


def _compile_rules(config: Config) -> None:
    if not config.precision.compile:
        return
    if config.activation.checkpoint == "selective":
        why = (
            "a compiled layer hides the products that activation.checkpoint=selective keeps; use full, or compile=false"
        )
        refuse("precision.compile", True, why)
    name = base_fields(config.model.name)["model_type"]
    if FAMILIES[name].experts:
        why = f"{name} is a mixture of experts, whose routing depends on the data and cannot be compiled; use false"
        refuse("precision.compile", True, why)


def _expert_rules(config: Config) -> None:
    """torch's grouped matrix product needs rows of a multiple of 16 bytes, which is 8 half-precision numbers."""
    fields = model_fields(config.model)
    family = FAMILIES[fields["model_type"]]
    if not family.experts or config.precision.dtype == "fp32":
        return
    given = {**family.defaults, **fields}
    inner = "moe_intermediate_size" if "moe_intermediate_size" in given else "intermediate_size"
    for name in ("hidden_size", inner):
        if given[name] % 8:
            nearest = max(8, round(given[name] / 8) * 8)
            why = f"a mixture of experts in {config.precision.dtype} needs a multiple of 8; use {nearest}"
            refuse(f"model.config.{name}", given[name], why)


def _data_rules(config: Config) -> None:
    data = config.data
    if data.source == "files" and not data.paths:
        refuse("data.paths", data.paths, "data.source=files needs some, for example data.paths=[corpus/*.jsonl]")
    if data.source == "hf" and not data.name:
        refuse("data.name", data.name, "data.source=hf needs one, for example data.name=HuggingFaceFW/fineweb-edu")
    # Without this check the run would ignore the paths and train on another corpus.
    if data.paths and data.source != "files":
        refuse("data.paths", data.paths, f"not read with data.source={data.source}; add data.source=files")
    for extension in data.extensions:
        if not extension.startswith(".") or not extension.strip("."):
            refuse(
                "data.extensions",
                data.extensions,
                f"an extension begins with a dot; use .{extension.strip('.') or 'log'}",
            )
    if data.extensions and data.source != "files":
        refuse("data.extensions", data.extensions, f"not read with data.source={data.source}; add data.source=files")
    if data.name and data.source != "hf":
        refuse("data.name", data.name, f"not read with data.source={data.source}; add data.source=hf")


def _split_rules(config: Config) -> None:
    split = config.parallel.split
    if split == "auto":
        return
    if not split or split[0] != 0:
        refuse("parallel.split", split, "the first stage starts at layer 0, for example [0,5,9]")
    if any(later <= earlier for earlier, later in pairwise(split)):
        nearest = sorted(set(split))
        refuse("parallel.split", split, f"first layers must grow from stage to stage; the nearest is {show(nearest)}")


def _schedule_rules(config: Config) -> None:
    steps, schedule = config.train.steps, config.schedule
    if schedule.warmup_steps > steps:
        why = f"more than train.steps={steps}; use schedule.warmup_steps={warmup_steps(steps)}, at most {steps}"
        refuse("schedule.warmup_steps", schedule.warmup_steps, why)
    left = steps - schedule.warmup_steps
    if schedule.decay_steps > left:
        why = f"more than the steps after warm-up, train.steps={steps} less schedule.warmup_steps="
        refuse("schedule.decay_steps", schedule.decay_steps, f"{why}{schedule.warmup_steps}; at most {left}")


_MODEL_RULES: tuple[Callable[[Config], None], ...] = (_place_rules, _run_rules, _model_rules, _pretrained_rules)
_RULES: tuple[Callable[[Config], None], ...] = (
    _compile_rules,
    _expert_rules,
    check_kernels,
    _data_rules,
    _split_rules,
    _schedule_rules,
)
