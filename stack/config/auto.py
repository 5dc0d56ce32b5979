"""Replaces `auto` by a value in keys where the value follows from the rest of the config.

`auto` in the sections `parallel` and `launch` depends on the hosts; `stack.plan` replaces it.
"""

from dataclasses import replace
from typing import NoReturn

from stack.config.schema import Config, Schedule
from stack.config.values import refuse

AUTO = "auto"
#: `optim.lr=auto`: AdamW's usual learning rate for a model that is trained from scratch.
_LR = 3e-4
#: Largest number of warm-up steps that `schedule.warmup_steps=auto` chooses.
_LONGEST_WARMUP = 2000


def without_auto(cfg: Config) -> Config:
    """Replaces `auto` in the sections `optim`, `schedule` and `data`. The result is saved, planned and trained.

    Raises:
        ConfigError: optim.lr=auto with SGD or with pretrained weights, for which no single rate suits every model.
    """
    optim, schedule, data = cfg.optim, cfg.schedule, cfg.data
    if optim.lr == AUTO:
        if optim.kind != "adamw" or cfg.model.init == "pretrained":
            _refuse_lr(cfg)
        optim = replace(optim, lr=_LR)
    if schedule.warmup_steps == AUTO:
        schedule = replace(schedule, warmup_steps=warmup_steps(cfg.train.steps))
    if data.tokenizer == AUTO:
        data = replace(data, tokenizer=cfg.model.name if cfg.model.init == "pretrained" else "bpe")
    return replace(cfg, optim=optim, schedule=schedule, data=data)


def warmup_steps(steps: int) -> int:
    """Warm-up steps of a run of `steps` steps: a tenth of them, at most 2000, and none for fewer than ten steps."""
    return min(steps // 10, _LONGEST_WARMUP)


def decay_steps(schedule: Schedule, steps: int) -> int:
    """Steps of the final decay of the schedule `wsd` in a run of `steps` steps."""
    return schedule.decay_steps or max(1, steps // 10)


def _refuse_lr(cfg: Config) -> NoReturn:
    if cfg.model.init == "scratch":
        refuse("optim.lr", AUTO, f"only AdamW has an auto rate; with optim.kind={cfg.optim.kind} use optim.lr=0.1")
    if cfg.optim.kind == "adamw":
        works = "experiment=finetune or optim.lr=1e-5"
    else:
        works = "optim.lr=1e-3"
    why = "a rate for training from scratch would ruin the weights of model.init=pretrained"
    refuse("optim.lr", AUTO, f"{why}; use {works}")
