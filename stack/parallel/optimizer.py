"""The optimizer of a rank's parameters, as ZeRO will shard it."""

from typing import Any

import torch

from stack.config.schema import Config
from stack.parallel.replicated import on_masters


def make_optimizer(
    parameters: list[torch.Tensor], cfg: Config, *, tied: torch.Tensor | None, masters: bool
) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum, without a compiled op; matrices are decayed, norms and biases are not.

    Args:
        tied: one of the copies of a tied embedding; alone in its group, so that both are sharded alike.
        masters: keep fp32 masters of parameters in other dtypes, which ZeRO 1 to 3 do by themselves.
    """
    decayed: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for parameter in parameters:
        # A ZeRO-3 parameter is an empty placeholder that remembers its shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if parameter is not tied:
            (decayed if len(shape) >= 2 else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": cfg.optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": [] if tied is None else [tied], "weight_decay": cfg.optim.weight_decay},
    ]
    options: dict[str, Any] = {"lr": cfg.optim.lr, "fused": True}
    kind: type[torch.optim.Optimizer]
    if cfg.optim.kind == "sgd":
        kind, options["momentum"] = torch.optim.SGD, cfg.optim.momentum
    else:
        kind, options["betas"], options["eps"] = torch.optim.AdamW, tuple(cfg.optim.betas), cfg.optim.eps
    # An empty group has no place in DeepSpeed's bookkeeping.
    filled = [group for group in groups if group["params"]]
    return on_masters(kind)(filled, **options) if masters else kind(filled, **options)
