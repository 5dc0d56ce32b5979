"""Makes the optimizer of a rank's parameters, which ZeRO then shards."""

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
    """torch's AdamW, or SGD with momentum. Weight decay applies to matrices, not to norms and biases.

    Args:
        parameters: all parameters of this rank.
        cfg: `cfg.optim` has the settings.
        tied: this rank's copy of a tied embedding. It gets a parameter group of its own, so that ZeRO shards the copies
            on both ranks alike.
        shape_of: returns the whole shape of a parameter that may be sharded.
        wrap: returns the optimizer class to use instead of torch's class.
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
    # DeepSpeed cannot handle empty parameter groups.
    return wrap(kind)([group for group in groups if group["params"]], **options)


def skip_unless_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Makes a fused optimizer skip its next update if `norm` (0-dimensional) is not finite. The optimizer's kernel
    reads the flag on the device, so the host does not wait."""
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
