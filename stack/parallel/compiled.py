"""Compiles decoder layers with torch.compile. The schedule, hooks and checkpointing around them are not compiled."""

import torch

from stack.models.build import Stage


def compile_layers(stage: Stage) -> None:
    """Compiles the forward of each decoder layer. Checkpointing and the hooks that gather and release ZeRO-3 parameters
    stay outside of the compiled code."""
    layers = stage.layers
    # All layers share one code object, which is compiled for several variants, with and without gradients. torch stops
    # compiling a code object after a few variants unless the limit is raised.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(layers))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)  # type: ignore[method-assign]
