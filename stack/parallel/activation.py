"""Activation checkpointing: what the forward of a decoder layer keeps for its backward."""

import functools
from typing import Any

import torch
import torch.utils.checkpoint
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from stack.config.families import FAMILIES
from stack.config.schema import Activation
from stack.models.build import Stage

#: Products whose results `selective` keeps: they cost most to compute again for the memory they take. The last two are
#: those of all experts of a mixture at once; transformers has its own operation where torch has none for the device.
_PRODUCTS = {
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    *("aten::_grouped_mm", "transformers::grouped_mm_fallback"),
}
#: Attention, whose results it keeps too.
_ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
}
#: Namespaces of the operations that flash-attention registers when it is imported.
_FLASH = {"flash_attn", "flash_attn_3"}


def apply_checkpointing(stage: Stage, activation: Activation) -> None:
    """Sets up the decoder layers of a stage.

    `full` keeps only the input of each layer and recomputes the layer in the backward; `every_k` does so in every
    `activation.every`-th layer of the model; `selective` keeps the results of matrix products and attention too, and
    recomputes the rest. With dropout it recomputes attention: an operation that is not run again draws no random
    numbers again, so that every later dropout of the layer would draw others than in the forward.

    transformers checkpoints a layer's `forward` inside its `__call__`, so ZeRO-3's gather and release hooks run once
    around the recomputation, not inside it. Non-reentrant: reentrant checkpointing runs a backward within a backward,
    which ZeRO's per-backward state does not expect.
    """
    if activation.checkpoint == "none":
        return
    dropout = _has_dropout(stage)
    options: dict[str, Any] = {"preserve_rng_state": dropout}
    if activation.checkpoint == "selective":
        keep = functools.partial(_keep, attention=not dropout)
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep)
    checkpoint = functools.partial(
        torch.utils.checkpoint.checkpoint, use_reentrant=False, determinism_check="none", **options
    )
    every = activation.every if activation.checkpoint == "every_k" else 1
    layer: Any
    for index, layer in stage.numbered_layers():
        if index % every == 0:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = checkpoint


def _keep(_context: Any, operation: Any, *_args: Any, attention: bool, **_options: Any) -> CheckpointPolicy:
    """Whether the result of an operation is kept.

    Args:
        attention: whether the result of attention is.
    """
    name = operation.name()
    kept = name in _PRODUCTS or (attention and (name in _ATTENTION or operation.namespace in _FLASH))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _has_dropout(stage: Stage) -> bool:
    """Whether the recomputation must draw the random numbers of the forward again. transformers' configs also have
    dropouts of heads that are not used here; a family lists its own."""
    config = stage.model.config
    return any("drop" in name and getattr(config, name) > 0 for name in FAMILIES[config.model_type].fields)
