"""Activation checkpointing: what the forward of a decoder layer keeps for its backward."""

import functools
from typing import Any

import torch
import torch.utils.checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from stack.config.schema import Activation
from stack.models.build import Stage

_ATEN = torch.ops.aten
#: Products whose results `selective` keeps: they cost most to compute again for the memory they take.
_KEPT = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
]


def apply_checkpointing(stage: Stage, activation: Activation) -> None:
    """Sets up the decoder layers of a stage.

    `full` keeps only the input of each layer and recomputes the layer in the backward; `every_k` does so in every
    `activation.every`-th layer of the model; `selective` keeps the results of matrix products and attention too, and
    recomputes the rest.

    transformers checkpoints a layer's `forward` inside its `__call__`, so ZeRO-3's gather and release hooks run once
    around the recomputation, not inside it. Non-reentrant: reentrant checkpointing runs a backward within a backward,
    which ZeRO's per-backward state does not expect.
    """
    if activation.checkpoint == "none":
        return
    options: dict[str, Any] = {"preserve_rng_state": _has_dropout(stage)}
    if activation.checkpoint == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _KEPT)
    checkpoint = functools.partial(
        torch.utils.checkpoint.checkpoint, use_reentrant=False, determinism_check="none", **options
    )
    every = activation.every if activation.checkpoint == "every_k" else 1
    layer: Any
    for index, layer in stage.numbered_layers():
        if index % every == 0:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = checkpoint


def _has_dropout(stage: Stage) -> bool:
    """Whether the recomputation must draw the random numbers of the forward again."""
    fields = stage.model.config.to_dict().items()
    return any(value > 0 for name, value in fields if "drop" in name and isinstance(value, float))
