"""The work that all contestants do: named models and batches, and overrides of them. Does not import torch."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from stack.config.schema import Config, Model
from stack.config.values import closest, show
from stack.errors import ConfigError
from stack.plan.shape import ModelShape, model_shape

_CHOICES = {"dtype": ("fp32", "bf16"), "checkpoint": ("none", "full")}
#: Overrides with this prefix are fields of the model.
_SHAPE = "shape."


@dataclass(frozen=True)
class Work:
    """A Llama, and the tokens that a replica sees in one optimizer step.

    shape: fields of LlamaConfig, except the context length (`seq_len`) and the tied embeddings (`tied`).
    seq_len: tokens in a sequence.
    micro_size: sequences in a microbatch.
    microbatches: microbatches of a replica in a step.
    dtype: of the computation, fp32 or bf16; master weights, gradient sums and optimizer state are fp32.
    checkpoint: activation checkpointing, none or full.
    tied: whether the input and output embeddings are one parameter.
    """

    shape: Mapping[str, Any] = field(default_factory=dict)
    seq_len: int = 256
    micro_size: int = 2
    microbatches: int = 8
    dtype: str = "fp32"
    checkpoint: str = "none"
    tied: bool = False

    @property
    def llama(self) -> dict[str, Any]:
        """All fields of LlamaConfig that differ from its defaults."""
        return {**self.shape, "max_position_embeddings": self.seq_len, "tie_word_embeddings": self.tied}

    @property
    def vocab_size(self) -> int:
        return self.shape["vocab_size"]

    @property
    def arithmetic(self) -> ModelShape:
        """Parameters and FLOPs of the model."""
        return model_shape(Model(name="llama", config=self.llama))

    def tokens(self, replicas: int) -> int:
        """Target tokens in one optimizer step."""
        return replicas * self.microbatches * self.micro_size * self.seq_len

    def flops(self, replicas: int) -> float:
        """Model FLOPs of one optimizer step: forward and backward, recomputation not counted."""
        return self.tokens(replicas) * self.arithmetic.training_flops(self.seq_len)

    def __str__(self) -> str:
        s = self.shape
        return (
            f"Llama {s['num_hidden_layers']} layers x {s['hidden_size']} (intermediate {s['intermediate_size']}, "
            f"{s['num_attention_heads']} heads, {s['num_key_value_heads']} kv heads, vocabulary {s['vocab_size']}, "
            f"{'tied' if self.tied else 'untied'}), {self.dtype}, AdamW, clipping at 1, {self.microbatches} "
            f"microbatches of {self.micro_size} x {self.seq_len} tokens a replica and step, "
            f"activation checkpointing {self.checkpoint}"
        )


def _shape(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5}

WORKS = {
    # For tests of the contestants.
    "tiny": Work(_shape(256, 64, 172, 2, 4, 2), seq_len=32, microbatches=4),
    # 301 M parameters, for checkpoints.
    "300m": Work(_shape(32000, 1024, 2816, 20, 16, 8), seq_len=256, microbatches=8),
    # For two CPU cores.
    "small": Work(_shape(4096, 256, 688, 8, 8, 4), seq_len=256, microbatches=8),
    # Like Llama-3.2-1B, for one H100.
    "1b": Work(
        {**_shape(128256, 2048, 8192, 16, 32, 8), **_ROPE}, seq_len=4096, microbatches=4, dtype="bf16", tied=True
    ),
}


def make_work(name: str, settings: Sequence[str] = ()) -> Work:
    """The named work with single fields overridden, e.g. `seq_len=512` or `shape.num_hidden_layers=4`.

    Raises:
        ConfigError: there is no such work or field, or the value has another type; the message is one line.
    """
    if name not in WORKS:
        raise ConfigError(f"work={name}: must be one of {', '.join(WORKS)}")
    work = WORKS[name]
    for key, value in map(split_setting, settings):
        if key.startswith(_SHAPE):
            found = key.removeprefix(_SHAPE)
            shape = {**work.shape, found: _checked(key, value, work.shape, found)}
            work = dataclasses.replace(work, shape=shape)
        else:
            fields = {f.name: getattr(work, f.name) for f in dataclasses.fields(work) if f.name != "shape"}
            work = dataclasses.replace(work, **{key: _checked(key, value, fields, key)})
    return work


def split_setting(setting: str) -> tuple[str, Any]:
    """Splits `key=value`; the value is parsed as YAML.

    Raises:
        ConfigError: there is no `=`, or the value is not YAML.
    """
    key, equals, text = setting.partition("=")
    if not (key and equals):
        raise ConfigError(f"{setting}: must be key=value, for example seq_len=512")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{setting}: the value cannot be read as YAML") from error


def apply_settings(tree: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Sets dotted keys in `tree` (a config as nested dicts). The values are checked later, against the schema.

    Raises:
        ConfigError: a key has a part that is not a section.
    """
    for key, value in map(split_setting, settings):
        *path, last = key.split(".")
        section: Any = tree
        for word in path:
            section = section.get(word) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            sections = ", ".join(f.name for f in dataclasses.fields(Config))
            raise ConfigError(f"{key}={show(value)}: no such section; there are {sections}")
        section[last] = value
    return tree


def _checked(key: str, value: Any, fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        nearest = closest(name, tuple(fields)) or f"one of {', '.join(fields)}"
        raise ConfigError(f"{key}={show(value)}: the work has no such field; did you mean {nearest}?")
    wanted = type(fields[name])
    if type(value) is not wanted:
        raise ConfigError(f"{key}={show(value)}: must be {wanted.__name__}, for example {show(fields[name])}")
    if wanted is int and value < 1:
        raise ConfigError(f"{key}={value}: must be at least 1")
    if value not in _CHOICES.get(name, (value,)):
        raise ConfigError(f"{key}={value}: must be one of {', '.join(_CHOICES[name])}")
    return value
