"""Decoder layers through torch.compile; what drives them stays as it is."""

import torch

from stack.models.build import Stage


def compile_layers(stage: Stage) -> None:
    """Compiles the forward of each decoder layer, inside its checkpointing and inside ZeRO-3's hooks: those gather,
    release and recompute around it."""
    layers = stage.layers
    # One code object serves all layers, with and without gradients, and torch gives up on one after a few variants.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(layers))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)  # type: ignore[method-assign]
