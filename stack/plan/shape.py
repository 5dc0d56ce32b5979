"""Counts the parameters and FLOPs of each part of a model from its Hugging Face config, without importing torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stack.config.families import FAMILIES, Family
from stack.config.model_folder import model_fields
from stack.config.schema import Model
from stack.errors import LayoutError

#: Upper bound of decoder layers: the planner's time grows with their square.
_MOST_LAYERS = 2000


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder whose layers all have the same number of parameters."""

    layers: int
    """Number of decoder layers."""
    hidden: int
    """Hidden size."""
    vocab: int
    """Vocabulary size of the model."""
    tied: bool
    """Whether the token embedding and the head share one parameter."""
    embedding_params: int
    """Parameters of the token embedding, and of the table of positions if positions are learned."""
    norm_params: int
    """Parameters of the final norm, before the head."""
    layer_params: int
    """Parameters of one decoder layer, including all experts."""
    layer_weights: int
    """Weights of a layer that one token is multiplied with; only the experts that it is sent to are counted."""
    attention_width: int
    """Query heads x head dimension."""
    idle_params: int = 0
    """Parameters of a layer's experts that a token is not sent to."""
    window: int | None = None
    """Size of the sliding window in tokens, including the token itself; None without sliding windows."""
    windowed_layers: int = 0
    """Number of layers with a sliding window."""

    @property
    def head_params(self) -> int:
        """Parameters of the output projection. A tied projection counts too, because its stage holds a copy."""
        return self.vocab * self.hidden

    @property
    def total_params(self) -> int:
        head = 0 if self.tied else self.head_params
        return self.embedding_params + self.layers * self.layer_params + self.norm_params + head

    @property
    def active_params(self) -> int:
        """Parameters that take part in the computation of one token: all except those of idle experts."""
        return self.total_params - self.layers * self.idle_params

    def layer_flops(self, seq_len: int) -> float:
        """Forward FLOPs of one decoder layer per token, the mean over the layers.

        Two FLOPs per weight of the matrix products, plus the two attention products over the earlier tokens that a
        token attends to. Positions masked by causality are not counted, unlike in PaLM, appendix B.
        """
        windowed = self.windowed_layers / self.layers
        reach = (1 - windowed) * _mean_reach(seq_len, None) + windowed * _mean_reach(seq_len, self.window)
        return 2 * self.layer_weights + 4 * self.attention_width * reach

    @property
    def head_flops(self) -> float:
        """Forward FLOPs of the output projection per token."""
        return 2 * self.hidden * self.vocab

    def training_flops(self, seq_len: int) -> float:
        """Model FLOPs of one forward and backward per token; recomputed activations are not counted."""
        return 3 * (self.layers * self.layer_flops(seq_len) + self.head_flops)


def model_shape(model: Model) -> ModelShape:
    """Sizes of the configured model.

    Raises:
        ConfigError: as for `model_fields`.
        LayoutError: numbers in its config do not fit together, or its layers differ in their number of parameters.
    """
    given = model_fields(model)
    family = FAMILIES[given["model_type"]]
    fields = {**family.defaults, **given}
    _check_layers(fields)
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    kv_heads = fields.get("num_key_value_heads") or heads
    _check_heads(fields, family, kv_heads)
    head_dim = fields.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, kv_heads * head_dim

    expert, router, experts, active = _mlp(fields, family)
    weights = hidden * (2 * q + 2 * kv) + router
    norm = hidden * (2 if family.classic else 1)
    small = family.norms * norm + _qk_norms(fields, family, q, kv, head_dim) + _biases(fields, family, q, kv)
    window, windowed_layers = _windows(fields, family)
    positions = 0 if family.rotary else fields["max_position_embeddings"]
    return ModelShape(
        layers=fields["num_hidden_layers"],
        hidden=hidden,
        vocab=fields["vocab_size"],
        tied=bool(fields["tie_word_embeddings"]),
        embedding_params=(fields["vocab_size"] + positions) * hidden,
        norm_params=norm,
        layer_params=weights + experts * expert + small,
        layer_weights=weights + active * expert,
        attention_width=q,
        idle_params=(experts - active) * expert,
        window=window,
        windowed_layers=windowed_layers,
    )


def _mlp(fields: Mapping[str, Any], family: Family) -> tuple[int, int, int, int]:
    """Four numbers: weights of one MLP, weights of the router, MLPs in a layer, and MLPs that a token is sent to.

    Raises:
        LayoutError: a token would be sent to more experts than there are.
    """
    expert = (2 if family.classic else 3) * fields["hidden_size"] * _inner(fields)
    if family.experts is None:
        return expert, 0, 1, 1
    experts, active = fields[family.experts], fields["num_experts_per_tok"]
    if active > experts:
        raise LayoutError(
            f"model.config.num_experts_per_tok={active} is more than {family.experts}={experts}; use at most {experts}"
        )
    return expert, fields["hidden_size"] * experts, experts, active


def _inner(fields: Mapping[str, Any]) -> int:
    """Width of an MLP, or of an expert. A mixture of experts may have one key for experts and one for dense layers."""
    keys = ("moe_intermediate_size", "intermediate_size", "n_inner")
    return next((fields[key] for key in keys if fields.get(key)), 4 * fields["hidden_size"])


def _biases(fields: Mapping[str, Any], family: Family, q: int, kv: int) -> int:
    """Bias parameters of a layer's linear modules. Switches that the model class does not read are ignored."""
    hidden, inner = fields["hidden_size"], _inner(fields)
    on = {key: fields[key] if key in family.fields else family.classic for key in ("attention_bias", "mlp_bias")}
    attention = q + 2 * kv + hidden if on["attention_bias"] else q + 2 * kv if family.qkv_bias else 0
    return attention + ((1 if family.classic else 2) * inner + hidden if on["mlp_bias"] else 0)


def _qk_norms(fields: Mapping[str, Any], family: Family, q: int, kv: int, head_dim: int) -> int:
    if not fields.get("use_qk_norm", True):
        return 0
    return {"none": 0, "head": 2 * head_dim, "width": q + kv}[family.qk_norm]


def _windows(fields: Mapping[str, Any], family: Family) -> tuple[int | None, int]:
    """The size of the sliding window (None without) and the number of layers that have it.

    Raises:
        LayoutError: layer_types asks for sliding windows and their size is not set.
    """
    if family.slides is None:
        return None, 0
    window = fields["sliding_window"] if fields.get("use_sliding_window", True) else None
    types = fields["layer_types"] if "layer_types" in family.fields else None
    if types and window is None and "sliding_attention" in types:
        switch = " and use_sliding_window=true" if "use_sliding_window" in family.fields else ""
        raise LayoutError(
            f"model.config.layer_types has sliding_attention, but no window is set; set sliding_window{switch}"
        )
    if window is None:
        return None, 0
    layers = range(fields["num_hidden_layers"])
    return window, types.count("sliding_attention") if types else sum(family.slides(fields, i) for i in layers)


def _check_layers(fields: Mapping[str, Any]) -> None:
    layers = fields["num_hidden_layers"]
    if layers > _MOST_LAYERS:
        raise LayoutError(f"model.config.num_hidden_layers={layers}: no model is so deep; use at most {_MOST_LAYERS}")
    for key in ("layer_types", "no_rope_layers"):
        if (listed := fields.get(key)) is not None and len(listed) != layers:
            raise LayoutError(
                f"model.config.{key} has {len(listed)} entries for num_hidden_layers={layers}; "
                f"give one for each layer, or null"
            )
    for key, uniform in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        if (fields.get(key) or uniform) != uniform:
            raise LayoutError(
                f"model: {key}={fields[key]} makes some layers dense and others a mixture, and stages are cut from "
                f"equal layers; use a model with experts in every layer"
            )


def _check_heads(fields: Mapping[str, Any], family: Family, kv_heads: int) -> None:
    hidden, heads, head_dim = fields["hidden_size"], fields["num_attention_heads"], fields.get("head_dim")
    if hidden % heads and (family.whole_heads or head_dim is None):
        raise LayoutError(
            f"model.config.num_attention_heads={heads} does not divide hidden_size={hidden}; "
            f"use {_nearest_divisor(hidden, heads)}"
        )
    if heads % kv_heads:
        raise LayoutError(
            f"model.config.num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; "
            f"use {_nearest_divisor(heads, kv_heads)}"
        )
    head_dim = head_dim or hidden // heads
    if family.rotary and head_dim % 2:
        instead = f"head_dim={head_dim + 1}" if "head_dim" in family.fields else f"hidden_size={heads * (head_dim + 1)}"
        of = f"head_dim={head_dim}" if fields.get("head_dim") else f"hidden_size={hidden} / num_attention_heads={heads}"
        raise LayoutError(
            f"model.config.{of}: the head dimension {head_dim} is odd and rotary embeddings need pairs; use {instead}"
        )


def _mean_reach(seq_len: int, window: int | None) -> float:
    """Number of tokens that a token attends to, as the mean over a sequence."""
    if window is None or window >= seq_len:
        return seq_len / 2
    return window - window * window / (2 * seq_len)


def _nearest_divisor(number: int, wanted: int) -> int:
    return min(divisors(number), key=lambda d: abs(d - wanted))


def divisors(number: int) -> list[int]:
    """Divisors of a positive number in ascending order. The time grows with its square root, so callers bound it."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
