"""Activation checkpointing: what the forward of a decoder layer keeps for its backward."""

import functools
from typing import Any

import torch.utils.checkpoint

from stack.models.build import Stage


def apply_checkpointing(stage: Stage, mode: str, *, dropout: bool) -> None:
    """`full` keeps only the input of each decoder layer and recomputes the layer in the backward.

    transformers checkpoints a layer's `forward` inside its `__call__`, so ZeRO-3's gather and release hooks run once
    around the recomputation, not inside it. Non-reentrant: reentrant checkpointing runs a backward within a backward,
    which ZeRO's per-backward state does not expect.
    """
    if mode == "none":
        return
    checkpoint = functools.partial(
        torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=dropout, determinism_check="none"
    )
    layer: Any
    for layer in stage.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = checkpoint
