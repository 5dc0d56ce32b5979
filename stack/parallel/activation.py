"""Activation checkpointing: sets which results of a decoder layer's forward are kept for its backward."""

import functools
from typing import Any

import torch
import torch.utils.checkpoint
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from stack.config.families import FAMILIES
from stack.config.schema import Activation
from stack.models.build import Stage

#: Matrix products whose results `selective` keeps: recomputing them costs most for the memory that it saves. The last
#: two compute all experts of a mixture at once; transformers uses its own operation on devices where torch has none.
_PRODUCTS = {
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    *("aten::_grouped_mm", "transformers::grouped_mm_fallback"),
}
#: Attention operations whose results `selective` keeps too.
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

    `full` keeps only the input of each layer and recomputes the layer in the backward. `every_k` does so in every
    `activation.every`-th layer of the model. `selective` also keeps the results of matrix products and attention, and
    recomputes the rest. In a model with dropout `selective` recomputes attention too: if attention did not draw its
    random numbers again, every later dropout of the layer would draw other numbers than in the forward.

    transformers checkpoints a layer's `forward` inside its `__call__`, so the hooks that gather and release ZeRO-3
    parameters run once around the recomputation, not inside it. Checkpointing is non-reentrant, because the reentrant
    kind runs a backward within a backward, for which ZeRO's state of the current backward is not made.
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
    """Whether `selective` keeps the result of an operation.

    Args:
        attention: whether it keeps the results of attention.
    """
    name = operation.name()
    kept = name in _PRODUCTS or (attention and (name in _ATTENTION or operation.namespace in _FLASH))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _has_dropout(stage: Stage) -> bool:
    """Whether the model uses dropout, so that recomputation must draw the same random numbers as the forward. Only the
    config fields that the family lists count: configs of transformers also have dropouts for heads not used here."""
    config = stage.model.config
    return any("drop" in name and getattr(config, name) > 0 for name in FAMILIES[config.model_type].fields)
