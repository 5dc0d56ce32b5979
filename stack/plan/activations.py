"""Bytes that autograd saves in a decoder layer, from the fields of the model."""

from dataclasses import dataclass
from typing import Any

from stack.config.families import FAMILIES, Family
from stack.config.model_folder import model_fields
from stack.config.schema import Config
from stack.plan.layout import Plan

#: Bytes of an element of each dtype.
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
FP32 = WIDTH["fp32"]


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that autograd saves in a decoder layer for each token of a microbatch."""

    whole: int
    """In a layer without recomputation."""
    kept: int
    """In a layer that `activation.checkpoint` recomputes; equal to `whole` with `none`."""
    norm: int
    """For one norm over the hidden size, including its input."""
    table: int
    """For the rotary tables and the attention mask, which each stage has once."""
    inner: int
    """Width of the MLP in elements, not bytes; summed over the experts that a token is sent to."""


def layer_activations(cfg: Config, plan: Plan) -> LayerActivations:
    """The activations that the layers of the configured model save. Exact for Llama's layer, approximate for norms and
    MLPs of other families.

    With w bytes per element, hidden size h, queries of width q, keys of width kv, n heads and an MLP of width i, the
    bytes for each token are:

        norm        4h (input in fp32) + 4 + w h (normalized) + w h (scaled)
        attention   w (2q + 2kv) + 4n: queries, keys, values, the output, and the softmax's sum of each head
        MLP         4 w i: gate, its activation, up, and their product

    torch.compile recomputes pointwise operations. A layer then saves w (4h + 2q + 2kv + 3i) + 4n + 8.
    """
    shape, width, family, fields = plan.shape, WIDTH[cfg.precision.dtype], *_family(cfg)
    heads, q = fields["num_attention_heads"], shape.attention_width
    kv = q * (fields.get("num_key_value_heads") or heads) // heads
    experts = fields[family.experts] if family.experts else 0
    matrices = 2 if family.classic else 3
    inner = (shape.layer_weights - shape.hidden * (2 * q + 2 * kv + experts)) // (matrices * shape.hidden)
    masked = cfg.data.pack or (shape.window is not None and shape.window < plan.seq_len)
    attention = _attention(cfg.model.attention, q, kv, heads, plan.seq_len, width, masked=masked)
    norm = _norm(cfg, shape.hidden, width, classic=family.classic)
    if cfg.precision.compile and cfg.model.attention != "eager":
        whole = width * (4 * shape.hidden + 3 * inner) + attention + 8
    else:
        around = _norm(cfg, q, width, classic=False) + _norm(cfg, kv, width, classic=False)
        qk_norms = around if family.qk_norm != "none" else 0
        whole = family.norms * norm + attention + qk_norms + _mlp(cfg, fields, inner) * width
        if family.experts:
            whole += 2 * width * shape.hidden * fields["num_experts_per_tok"] + 2 * FP32 * experts
    products = width * (2 * shape.hidden + q + 2 * kv + (matrices - 1) * inner)
    if family.experts:
        # The results of the second matrix of each expert that a token is sent to, and of the router.
        products += width * (shape.hidden * (fields["num_experts_per_tok"] - 1) + experts)
    eager = cfg.model.attention == "eager"
    products += width * q + (width * heads * plan.seq_len if eager else FP32 * heads)
    kept = {"none": whole, "selective": width * shape.hidden + products}
    return LayerActivations(
        whole=whole,
        kept=kept.get(cfg.activation.checkpoint, width * shape.hidden),
        norm=norm,
        table=(2 * width * (q // heads) if family.rotary else 0) + (plan.seq_len if masked else 0),
        inner=inner,
    )


def _family(cfg: Config) -> tuple[Family, dict[str, Any]]:
    """The model's family, and its fields with their values, defaults included."""
    given = model_fields(cfg.model)
    family = FAMILIES[given["model_type"]]
    return family, {**family.defaults, **given}


def _attention(kind: str, q: int, kv: int, heads: int, reach: int, width: int, *, masked: bool) -> int:
    """Bytes per token that attention saves.

    With a mask, SDPA repeats keys and values for all query heads, and turns the boolean mask into numbers in each
    layer.

    Args:
        kind: `model.attention`.
        q: width of all query heads.
        kv: width of all key heads.
        heads: number of query heads.
        reach: tokens that a query may attend to.
        width: bytes of an element.
        masked: whether an attention mask is passed.
    """
    if kind == "eager":
        scores = heads * reach * (FP32 + (width if width < FP32 else 0))
        return width * 4 * q + scores
    if kind == "sdpa" and masked:
        return width * (4 * q + reach) + FP32 * heads
    return width * (2 * q + 2 * kv) + FP32 * heads


def _norm(cfg: Config, size: int, width: int, *, classic: bool) -> int:
    """Bytes per token that a norm over `size` elements and the layer after it save. Fused kernels and LayerNorm save
    their input in the compute dtype, `width` bytes per element."""
    if classic:
        return 2 * width * size + 2 * FP32
    if cfg.kernels.rms_norm == "liger":
        return 2 * width * size + FP32
    return (FP32 + 2 * width) * size + FP32


def _mlp(cfg: Config, fields: dict[str, Any], inner: int) -> int:
    """Elements per token that an MLP of width `inner` saves. Liger's fused gate recomputes the activation.
    transformers computes the tanh form of GELU in five steps and saves each."""
    activation = fields.get("activation_function") or fields.get("hidden_act")
    if FAMILIES[fields["model_type"]].classic:
        return (5 if activation == "gelu_new" else 2) * inner
    return (3 if cfg.kernels.swiglu == "liger" else 4) * inner
