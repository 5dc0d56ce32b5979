"""The legal values of each key of `model.config`, for all families together.

The keys are those of the config classes of transformers 5, without the ones that training does not use. Rotary settings
are in `stack.config.rotary`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from stack.config.values import Spec, check_value, closest, refuse

Tree = Mapping[str, Any]
"""Key -> Spec, or the Tree of a section."""

_ACTIVATION = Spec(str, choices=("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2"))
#: Upper bound of sizes and counts. It is larger than in any model, and small enough for loops and exact arithmetic.
MOST = 2**24
#: Upper bound of distances between positions. Models without a length limit have numbers of about this size.
FURTHEST = 2**31
_SIZE = Spec(int, low=1, high=MOST)
_REACH = Spec(int, low=1, high=FURTHEST)
_SCALE = Spec(float, above=0)
_DROPOUT = Spec(float, low=0, below=1)
_SWITCH = Spec(bool)

#: Null is legal for a key with `nullable`, and for every key whose default in the family is null.
SPECS: dict[str, Spec] = {
    "vocab_size": Spec(int, low=2, high=MOST),
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "n_inner": _SIZE,
    "num_hidden_layers": _SIZE,
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE,
    "head_dim": Spec(int, low=2, high=MOST),
    "max_position_embeddings": _REACH,
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
    "sliding_window": _REACH,
    "max_window_layers": Spec(int, low=0, high=MOST),
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

#: Groups of keys with the same meaning in different families. They serve for suggestions: their spelling is too
#: different for a comparison of strings.
_SYNONYMS = (
    ("intermediate_size", "moe_intermediate_size", "n_inner"),
    ("hidden_act", "hidden_activation", "activation_function"),
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    ("attention_dropout", "attn_pdrop"),
    ("hidden_dropout", "resid_pdrop"),
    ("num_experts", "num_local_experts"),
)


def check_fields(values: Mapping[str, Any], tree: Tree, family: str, path: str = "model.config") -> None:
    """Checks the values of `model.config`, or of a section in it, against the fields of one family.

    Args:
        values: key -> value.
        tree: the family's fields, or those of the section.
        family: name of the family, for messages.
        path: dotted path of the section.

    Raises:
        ConfigError: the family has no such key, or the value is not legal for it.
    """
    for key, value in values.items():
        inner = f"{path}.{key}"
        if key not in tree:
            meant = _nearest(key, tree)
            hint = f"did you mean {meant}?" if meant else f"its keys are {', '.join(tree)};"
            refuse(inner, value, f"{family} has no such key; {hint} drop a preset's key with ~{inner}")
        if isinstance(value, Mapping):
            check_fields(value, tree[key], family, inner)
        else:
            check_value(inner, value, tree[key])


def union(trees: Iterable[Tree]) -> dict[str, Any]:
    """Merges trees: every key that is in any of them. Null is legal for a key if it is legal in one of the trees."""
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
