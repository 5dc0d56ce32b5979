"""The optimizer of a rank's parameters, as ZeRO will shard it."""

from collections.abc import Callable
from typing import Any

import torch

from stack.config.schema import Config

Kind = type[torch.optim.Optimizer]


def make_optimizer(
    parameters: list[torch.Tensor],
    cfg: Config,
    *,
    tied: torch.Tensor | None = None,
    shape_of: Callable[[torch.Tensor], torch.Size] = lambda parameter: parameter.shape,
    wrap: Callable[[Kind], Kind] = lambda kind: kind,
) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum, of torch; matrices are decayed, norms and biases are not.

    Args:
        tied: one of the copies of a tied embedding; alone in its group, so that both are sharded alike.
        shape_of: the whole shape of a parameter that may be sharded.
        wrap: makes another class of the optimizer's.
    """
    decayed: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for parameter in parameters:
        if parameter is not tied:
            (decayed if len(shape_of(parameter)) >= 2 else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": cfg.optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": [] if tied is None else [tied], "weight_decay": cfg.optim.weight_decay},
    ]
    options: dict[str, Any] = {"lr": cfg.optim.lr, "fused": cfg.optim.fused, "foreach": not cfg.optim.fused}
    kind: Kind
    if cfg.optim.kind == "sgd":
        kind, options["momentum"] = torch.optim.SGD, cfg.optim.momentum
    else:
        kind, options["betas"], options["eps"] = torch.optim.AdamW, tuple(cfg.optim.betas), cfg.optim.eps
    # An empty group has no place in DeepSpeed's bookkeeping.
    return wrap(kind)([group for group in groups if group["params"]], **options)


def skip_unless_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Has the next update of a fused optimizer left out if `norm` is not finite; its kernel reads that on the device,
    so the host need not wait to know."""
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
