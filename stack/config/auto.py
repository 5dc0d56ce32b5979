"""What the word `auto` of a key stands for, where that follows from other keys alone.

`auto` of `parallel` and `launch` is not here: it depends on the hosts, and is settled when the layout is planned.
"""

from dataclasses import replace
from typing import NoReturn

from stack.config.schema import Config, Schedule
from stack.config.values import refuse

AUTO = "auto"
#: AdamW's usual rate for a model that is trained from scratch.
_LR = 3e-4
#: Longest warm-up that is chosen without being asked for, in steps.
_LONGEST_WARMUP = 2000


def without_auto(cfg: Config) -> Config:
    """The config with numbers and names in place of `auto`, as it is saved, planned and trained.

    Raises:
        ConfigError: optim.lr=auto, where no one rate is right for every model.
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
    """Steps of warm-up for a run of `steps` steps: a tenth of them, at most 2000; none for fewer than ten steps."""
    return min(steps // 10, _LONGEST_WARMUP)


def decay_steps(schedule: Schedule, steps: int) -> int:
    """Steps of the final decay of `wsd`, in a run of `steps` steps."""
    return schedule.decay_steps or max(1, steps // 10)


def _refuse_lr(cfg: Config) -> NoReturn:
    if cfg.model.init == "scratch":
        refuse("optim.lr", AUTO, f"only AdamW has a rate of its own; with optim.kind={cfg.optim.kind} use optim.lr=0.1")
    if cfg.optim.kind == "adamw":
        works = "experiment=finetune or optim.lr=1e-5"
    else:
        works = "optim.lr=1e-3"
    why = "a rate for training from scratch would ruin the weights of model.init=pretrained"
    refuse("optim.lr", AUTO, f"{why}; use {works}")
