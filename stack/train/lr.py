"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

import math

from stack.config.auto import decay_steps
from stack.config.schema import Optim, Schedule


def learning_rate(step: int, steps: int, *, optim: Optim, schedule: Schedule) -> float:
    """Learning rate of optimizer step `step` (the first is 0) of `steps`.

    A linear warm-up, then by `schedule.kind`: constant; a linear or cosine (Loshchilov & Hutter 2017) decay to
    `min_lr_ratio` of the peak at the last step; or constant with a linear decay at the end (`wsd`, Hu et al. 2024,
    MiniCPM).
    """
    if step < schedule.warmup_steps:
        return optim.lr * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return optim.lr
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        start = max(start, steps - decay_steps(schedule, steps))
    if step < start:
        return optim.lr
    # A decay of a single step is at its end already.
    progress = (step - start) / (steps - 1 - start) if steps - 1 > start else 1.0
    keep = (1 + math.cos(math.pi * progress)) / 2 if schedule.kind == "cosine" else 1 - progress
    return optim.lr * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * keep)
