"""The model as arithmetic: parameters and FLOPs of each part, from its Hugging Face config, without torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stack.config.schema import Model
from stack.errors import ConfigError, LayoutError

#: Defaults of `transformers.LlamaConfig`, for fields that neither the folder nor `model.config` sets.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with gated MLP and grouped-query attention (Llama)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    attention_bias: bool
    mlp_bias: bool
    tied: bool

    @property
    def embedding_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def head_params(self) -> int:
        """Parameters of the output projection; a tied one is counted here too, since its stage holds a copy."""
        return self.vocab * self.hidden

    @property
    def norm_params(self) -> int:
        return self.hidden

    @property
    def layer_params(self) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * q + 2 * kv) + (q + 2 * kv + self.hidden if self.attention_bias else 0)
        mlp = 3 * self.hidden * self.intermediate + (2 * self.intermediate + self.hidden if self.mlp_bias else 0)
        return attention + mlp + 2 * self.hidden

    @property
    def total_params(self) -> int:
        head = 0 if self.tied else self.head_params
        return self.embedding_params + self.layers * self.layer_params + self.norm_params + head

    def layer_flops(self, seq_len: int) -> float:
        """Forward FLOPs of one decoder layer per token.

        Two per weight of the matrix products, plus the two attention products over an average of `seq_len / 2`
        earlier tokens: causal attention is counted once (PaLM, appendix B, with the causal half left out).
        """
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = self.hidden * (2 * q + 2 * kv) + 3 * self.hidden * self.intermediate
        return 2 * weights + 2 * seq_len * q

    @property
    def head_flops(self) -> float:
        """Forward FLOPs of the output projection per token."""
        return 2 * self.hidden * self.vocab

    def training_flops(self, seq_len: int) -> float:
        """Model FLOPs of one forward and backward per token; recomputed activations are not counted."""
        return 3 * (self.layers * self.layer_flops(seq_len) + self.head_flops)


def model_fields(model: Model) -> dict[str, Any]:
    """Hugging Face config fields of the model: the folder's config.json, overridden by `model.config`.

    Raises:
        ConfigError: the folder's config.json cannot be read.
    """
    fields: dict[str, Any] = {}
    if model.name != "llama":
        path = Path(model.name) / "config.json"
        try:
            fields = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.name={model.name}: {path} cannot be read ({error})") from error
    return {**fields, **model.config}


def model_shape(model: Model) -> ModelShape:
    """Sizes of the configured model.

    Raises:
        LayoutError: heads do not divide the width, or key-value heads do not divide the heads.
    """
    fields: Mapping[str, Any] = {**_DEFAULTS, **{k: v for k, v in model_fields(model).items() if v is not None}}
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    kv_heads = fields.get("num_key_value_heads") or heads
    if "head_dim" not in fields and hidden % heads:
        raise LayoutError(
            f"model.config.num_attention_heads={heads} does not divide hidden_size={hidden}; "
            f"use {_nearest_divisor(hidden, heads)}"
        )
    if heads % kv_heads:
        raise LayoutError(
            f"model.config.num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; "
            f"use {_nearest_divisor(heads, kv_heads)}"
        )
    head_dim = fields.get("head_dim") or hidden // heads
    if head_dim % 2:
        raise LayoutError(
            f"model.config: the head dimension {head_dim} is odd and rotary embeddings need pairs; "
            f"use head_dim={head_dim + 1}"
        )
    return ModelShape(
        layers=fields["num_hidden_layers"],
        hidden=hidden,
        intermediate=fields["intermediate_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=fields["vocab_size"],
        attention_bias=bool(fields["attention_bias"]),
        mlp_bias=bool(fields["mlp_bias"]),
        tied=bool(fields["tie_word_embeddings"]),
    )


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
