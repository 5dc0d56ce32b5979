"""The model families: the fields that `model.config` accepts for each, and the structure of its decoder layer.

Defaults are those of the family's config class in transformers 5; tests/unit/test_shape.py compares them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stack.config.model_fields import SPECS, Tree
from stack.config.rotary import PARTIAL, PHI_ROPE, ROPE
from stack.config.values import Spec


@dataclass(frozen=True)
class Family:
    """One Hugging Face decoder class. By default its layer is like Llama's: RMS norms, a gated MLP, and only those
    biases that a config field switches on."""

    fields: Tree
    """Fields of the family's Hugging Face config that `model.config` accepts, with their defaults and bounds."""
    classic: bool = False
    """The layer is like GPT-2's: LayerNorms, an MLP of two matrices, and biases in both and in the attention."""
    norms: int = 2
    """Norms over the hidden size in one layer."""
    qk_norm: Literal["none", "head", "width"] = "none"
    """Norms of queries and keys: none, over each head, or over the width of all heads together."""
    qkv_bias: bool = False
    """Queries, keys and values always have biases, and no other projection has any."""
    whole_heads: bool = False
    """The number of heads must divide the hidden size even if head_dim is set."""
    sdpa: bool = True
    """Whether transformers supports SDPA for the class. SDPA's kernels cannot cap attention logits."""
    experts: str | None = None
    """Name of the field with the number of experts, in a mixture of experts."""
    slides: Callable[[Mapping[str, Any], int], bool] | None = None
    """Tells from the fields and the index of a layer whether the layer has a sliding window, if no layer_types are set.
    """
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other field names in config.json files -> the names in `fields`."""
    liger: tuple[str, ...] = ()
    """Keys of the section `kernels` whose part of the layer Liger can replace for this class."""

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of every field that is not a section, as in the config class."""
        return {key: spec.example for key, spec in self.fields.items() if isinstance(spec, Spec)}

    @property
    def rotary(self) -> bool:
        """Whether the class has rotary embeddings. Otherwise positions are learned, in a table with
        max_position_embeddings rows."""
        return "rope_parameters" in self.fields

    @property
    def rotary_by_layer(self) -> bool:
        """Whether the rotary settings have a section for each layer type."""
        return "full_attention" in self.fields.get("rope_parameters", {})


_DECODER: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rope_parameters": ROPE,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}


def _fields(*lacks: str, **own: Any) -> Tree:
    """The fields of a family: those of `_DECODER` without `lacks`, plus `own` with the family's defaults or specs."""

    def spec(key: str, given: Any) -> Spec | Tree:
        if isinstance(given, Spec | Mapping):
            return given
        return replace(SPECS[key], example=given, nullable=SPECS[key].nullable or given is None)

    return {key: spec(key, given) for key, given in {**_DECODER, **own}.items() if key not in lacks}


_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "sliding_window": 4096,
    "layer_types": None,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
#: Parts of a Llama-like layer that Liger can replace.
_LIGER = ("rms_norm", "rope", "swiglu")
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 8, "router_aux_loss_coef": 0.001}


def _late(fields: Mapping[str, Any], layer: int) -> bool:
    return layer >= fields["max_window_layers"]


def _every(_: Mapping[str, Any], __: int) -> bool:
    return True


def _without_rope(fields: Mapping[str, Any], layer: int) -> bool:
    if fields["no_rope_layers"] is None:
        return (layer + 1) % fields["no_rope_layer_interval"] == 0
    return not fields["no_rope_layers"][layer]


#: By `model_type` of the Hugging Face config.
FAMILIES: dict[str, Family] = {
    "llama": Family(_fields(head_dim=None, attention_bias=False, mlp_bias=False), whole_heads=True, liger=_LIGER),
    "mistral": Family(
        _fields(
            intermediate_size=14336,
            num_key_value_heads=8,
            head_dim=None,
            max_position_embeddings=131072,
            sliding_window=replace(SPECS["sliding_window"], example=4096, nullable=True),
        ),
        slides=_every,
        liger=_LIGER,
    ),
    "qwen2": Family(_fields(**_QWEN), qkv_bias=True, slides=_late, liger=_LIGER),
    "qwen3": Family(_fields(**_QWEN, head_dim=128, attention_bias=False), qk_norm="head", slides=_late, liger=_LIGER),
    "gemma2": Family(
        _fields("hidden_act", **_GEMMA),
        norms=4,
        whole_heads=True,
        slides=lambda _, layer: layer % 2 == 0,
        sdpa=False,
        liger=("rms_norm", "rope"),
    ),
    "gemma3_text": Family(
        _fields(
            "hidden_act",
            **{
                **_GEMMA,
                "vocab_size": 262208,
                "max_position_embeddings": 131072,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
            },
            rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE},
        ),
        norms=4,
        qk_norm="head",
        whole_heads=True,
        # Config files of transformers 4 have sliding_window_pattern, a period in layers, instead of layer_types.
        slides=lambda fields, layer: (layer + 1) % fields.get("sliding_window_pattern", 6) != 0,
        liger=("rms_norm", "rope"),
    ),
    "phi3": Family(
        _fields(
            vocab_size=32064,
            hidden_size=3072,
            intermediate_size=8192,
            max_position_embeddings=4096,
            rope_parameters=PHI_ROPE,
            rms_norm_eps=1e-5,
            resid_pdrop=0.0,
            sliding_window=None,
        ),
        slides=_every,
        liger=_LIGER,
    ),
    "olmo2": Family(_fields(vocab_size=50304, rms_norm_eps=1e-5, attention_bias=False), qk_norm="width", liger=_LIGER),
    "gpt_neox": Family(
        _fields(
            "num_key_value_heads",
            "rms_norm_eps",
            vocab_size=50432,
            hidden_size=6144,
            intermediate_size=24576,
            num_hidden_layers=44,
            num_attention_heads=64,
            rope_parameters={**ROPE, **PARTIAL},
            hidden_act="gelu",
            layer_norm_eps=1e-5,
            hidden_dropout=0.0,
            attention_bias=True,
            use_parallel_residual=True,
        ),
        classic=True,
    ),
    "gpt2": Family(
        _fields(
            *("num_key_value_heads", "intermediate_size", "rope_parameters", "hidden_act"),
            *("rms_norm_eps", "attention_dropout"),
            vocab_size=50257,
            hidden_size=768,
            n_inner=None,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=1024,
            activation_function="gelu_new",
            layer_norm_epsilon=1e-5,
            attn_pdrop=0.1,
            embd_pdrop=0.1,
            resid_pdrop=0.1,
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            tie_word_embeddings=True,
        ),
        classic=True,
        aliases={
            "n_embd": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
        },
    ),
    "granite": Family(
        _fields(
            attention_bias=False,
            mlp_bias=False,
            embedding_multiplier=1.0,
            attention_multiplier=1.0,
            residual_multiplier=1.0,
            logits_scaling=1.0,
        ),
        liger=_LIGER,
    ),
    "smollm3": Family(
        _fields(
            vocab_size=128256,
            hidden_size=2048,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=4,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            attention_bias=False,
            mlp_bias=False,
            use_sliding_window=False,
            sliding_window=None,
            layer_types=None,
            no_rope_layers=None,
            no_rope_layer_interval=4,
        ),
        slides=_without_rope,
        liger=_LIGER,
    ),
    "cohere": Family(
        _fields(
            "rms_norm_eps",
            vocab_size=256000,
            hidden_size=8192,
            intermediate_size=22528,
            num_hidden_layers=40,
            num_attention_heads=64,
            max_position_embeddings=8192,
            layer_norm_eps=1e-5,
            tie_word_embeddings=True,
            attention_bias=False,
            use_qk_norm=False,
            logit_scale=0.0625,
        ),
        norms=1,
        qk_norm="width",
    ),
    "mixtral": Family(
        _fields(
            intermediate_size=14336,
            num_key_value_heads=8,
            head_dim=None,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            sliding_window=None,
            num_local_experts=8,
            **{**_EXPERTS, "num_experts_per_tok": 2},
            router_jitter_noise=0.0,
        ),
        experts="num_local_experts",
        slides=_every,
        aliases={"num_experts": "num_local_experts"},
        liger=_LIGER,
    ),
    "qwen3_moe": Family(
        _fields(
            # The width of dense layers, which are refused for this family in stack/plan/shape.py.
            "intermediate_size",
            vocab_size=151936,
            hidden_size=2048,
            num_hidden_layers=24,
            num_key_value_heads=4,
            # head_dim is not in the config class, but the attention reads it and every published model sets it.
            head_dim=SPECS["head_dim"],
            max_position_embeddings=32768,
            attention_bias=False,
            use_sliding_window=False,
            sliding_window=4096,
            moe_intermediate_size=768,
            num_experts=128,
            **_EXPERTS,
            norm_topk_prob=False,
        ),
        qk_norm="head",
        experts="num_experts",
        slides=_every,
        aliases={"num_local_experts": "num_experts"},
        liger=_LIGER,
    ),
    "olmoe": Family(
        _fields(
            vocab_size=50304,
            hidden_size=2048,
            intermediate_size=2048,
            num_hidden_layers=16,
            num_attention_heads=16,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            attention_bias=False,
            clip_qkv=None,
            num_experts=64,
            **{**_EXPERTS, "router_aux_loss_coef": 0.01},
            norm_topk_prob=False,
        ),
        qk_norm="width",
        experts="num_experts",
        aliases={"num_local_experts": "num_experts"},
    ),
}
