"""Decides, from numbers that are equal on every rank, whether a run may go on."""

import math

from stack.errors import NumericsError


def check_finite(*, step: int, loss: float, grad_norm: float, loss_scale: float | None = None) -> None:
    """Stops the run at a loss or a gradient norm that is not finite. In fp16 a norm that is not finite only lowers the
    loss scale, as long as the scale is above 1.

    Raises:
        NumericsError: on every rank at once, since both values are global.
    """
    for name, value in (("loss", loss), ("grad_norm", grad_norm)):
        overflow = name == "grad_norm" and loss_scale is not None and loss_scale > 1
        if not math.isfinite(value) and not overflow:
            raise NumericsError(
                f"{name} is {value} at step {step} and training cannot go on; "
                "lower optim.lr, lengthen schedule.warmup_steps or set optim.grad_clip"
            )
