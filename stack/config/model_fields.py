"""What each key of `model.config` accepts, whichever family has it.

The names are those of the config classes of transformers 5, less what pre-training from scratch does not use. Rotary
settings live in `rope_parameters` there; a `rope_theta` beside it would be overruled in silence, so it is not offered.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from stack.config.values import Spec, check_value, closest, refuse

Tree = Mapping[str, Any]
"""Key -> Spec, or the Tree of a section."""

ROPE: dict[str, Spec] = {
    "rope_type": Spec(str, "default", choices=("default", "linear", "llama3")),
    "rope_theta": Spec(float, 500000.0, above=0),
    "factor": Spec(float, 8.0, low=1),
    "low_freq_factor": Spec(float, 1.0, above=0),
    "high_freq_factor": Spec(float, 4.0, above=0),
    "original_max_position_embeddings": Spec(int, 8192, low=1),
}
PARTIAL = {"partial_rotary_factor": Spec(float, 0.25, above=0, high=1)}
PLAIN_ROPE = {"rope_type": Spec(str, "default", choices=("default",)), "rope_theta": ROPE["rope_theta"], **PARTIAL}

#: Keys that a rope_type needs. Beside them and those that every type reads, a key is an error: transformers only warns.
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ROPE_ALWAYS = {"rope_theta", "partial_rotary_factor", "rope_type"}

_ACTIVATION = Spec(str, choices=("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2"))
_SIZE = Spec(int, low=1)
_SCALE = Spec(float, above=0)
_DROPOUT = Spec(float, low=0, below=1)
_SWITCH = Spec(bool)

#: Null is legal besides where it is the family's default.
SPECS: dict[str, Spec] = {
    "vocab_size": Spec(int, low=2),
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "n_inner": _SIZE,
    "num_hidden_layers": _SIZE,
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE,
    "head_dim": Spec(int, low=2),
    "max_position_embeddings": _SIZE,
    "hidden_act": _ACTIVATION,
    "hidden_activation": _ACTIVATION,
    "activation_function": _ACTIVATION,
    "rms_norm_eps": _SCALE,
    "layer_norm_eps": _SCALE,
    "layer_norm_epsilon": _SCALE,
    "attention_bias": _SWITCH,
    "mlp_bias": _SWITCH,
    "attention_dropout": _DROPOUT,
    "hidden_dropout": _DROPOUT,
    "attn_pdrop": _DROPOUT,
    "embd_pdrop": _DROPOUT,
    "resid_pdrop": _DROPOUT,
    "initializer_range": Spec(float, above=0, high=1),
    "tie_word_embeddings": _SWITCH,
    "use_sliding_window": _SWITCH,
    "sliding_window": _SIZE,
    "max_window_layers": Spec(int, low=0),
    "layer_types": Spec(str, is_list=True, choices=("full_attention", "sliding_attention")),
    "no_rope_layers": Spec(int, is_list=True, choices=(0, 1)),
    "no_rope_layer_interval": _SIZE,
    "use_parallel_residual": _SWITCH,
    "use_qk_norm": _SWITCH,
    "clip_qkv": _SCALE,
    "query_pre_attn_scalar": _SIZE,
    "attn_logit_softcapping": replace(_SCALE, nullable=True),
    "final_logit_softcapping": replace(_SCALE, nullable=True),
    "scale_attn_weights": _SWITCH,
    "scale_attn_by_inverse_layer_idx": _SWITCH,
    "embedding_multiplier": _SCALE,
    "attention_multiplier": _SCALE,
    "residual_multiplier": _SCALE,
    "logits_scaling": _SCALE,
    "logit_scale": _SCALE,
    "num_experts": _SIZE,
    "num_local_experts": _SIZE,
    "num_experts_per_tok": _SIZE,
    "moe_intermediate_size": _SIZE,
    "norm_topk_prob": _SWITCH,
    "router_aux_loss_coef": Spec(float, low=0),
    "router_jitter_noise": Spec(float, low=0, below=1),
}

#: Keys of one meaning: a family that lacks one may have another, and no likeness of letters tells which.
_SYNONYMS = (
    ("intermediate_size", "moe_intermediate_size", "n_inner"),
    ("hidden_act", "hidden_activation", "activation_function"),
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    ("attention_dropout", "attn_pdrop"),
    ("hidden_dropout", "resid_pdrop"),
    ("num_experts", "num_local_experts"),
)


def check_fields(values: Mapping[str, Any], tree: Tree, family: str, path: str = "model.config") -> None:
    """`values` against the keys of one family, and what that family allows them to be.

    Raises:
        ConfigError: the family has no such key, or not with this value.
    """
    for key, value in values.items():
        inner = f"{path}.{key}"
        if key not in tree:
            meant = _nearest(key, tree)
            hint = f"did you mean {meant}?" if meant else f"its keys are {', '.join(tree)};"
            refuse(inner, value, f"{family} has no such key; {hint} drop a preset's with ~{inner}")
        if isinstance(value, Mapping):
            check_fields(value, tree[key], family, inner)
        else:
            check_value(inner, value, tree[key])


def check_rope(rope: Mapping[str, Any], path: str = "model.config.rope_parameters") -> None:
    """Rotary settings as a whole, each layer type's where they differ; each value is legal by now.

    Raises:
        ConfigError: a key that the rope_type needs is missing, or one is there that it does not read.
    """
    sections = {key: value for key, value in rope.items() if isinstance(value, Mapping)}
    for key, section in sections.items():
        check_rope(section, f"{path}.{key}")
    if sections:
        return
    rope_type = rope.get("rope_type", "default")
    needs = _ROPE_NEEDS[rope_type]
    for key in needs:
        if key not in rope:
            refuse(path, rope, f"rope_type {rope_type} needs {key}; add {path}.{key}={ROPE[key].example:g}")
    for key, value in rope.items():
        if key not in {*_ROPE_ALWAYS, *needs}:
            readers = ", ".join(kind for kind, keys in _ROPE_NEEDS.items() if key in keys)
            refuse(f"{path}.{key}", value, f"not read with rope_type {rope_type}, only with {readers}")
    if rope_type == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        low = rope["low_freq_factor"]
        refuse(f"{path}.high_freq_factor", rope["high_freq_factor"], f"must be above low_freq_factor={low:g}")


def union(trees: Iterable[Tree]) -> dict[str, Any]:
    """Every key of any tree; null is legal where it is in one of them."""
    merged: dict[str, Any] = {}
    for tree in trees:
        for key, node in tree.items():
            known = merged.get(key)
            if isinstance(node, Spec):
                merged[key] = replace(known, nullable=known.nullable or node.nullable) if known else node
            else:
                merged[key] = union([known or {}, node])
    return merged


def _nearest(key: str, tree: Tree) -> str | None:
    for same in _SYNONYMS:
        if key in same and (own := next((other for other in same if other in tree), None)):
            return own
    return closest(key, [*tree], cutoff=0.65)
