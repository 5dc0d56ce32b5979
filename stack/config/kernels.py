"""What `kernels` may say for a model, and what `auto` means. What a host must have is asked when ranks start."""

from dataclasses import fields
from typing import Any

from stack.config.families import FAMILIES, Family
from stack.config.model_folder import model_fields
from stack.config.schema import Config
from stack.config.values import refuse, show

#: Fields by which a class changes its logits after the head -> the values that leave them as they are.
_AFTER_HEAD: dict[str, tuple[Any, ...]] = {
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "final_logit_softcapping": (None, 0),
}


def loss_kernel(config: Config) -> str:
    """`kernels.loss` without `auto`: logits, chunked or liger."""
    if config.kernels.loss != "auto":
        return config.kernels.loss
    return "logits" if _changed_after_head(config) else "chunked"


def liger_parts(config: Config) -> list[str]:
    """The keys of `kernels` that say liger."""
    return [part.name for part in fields(config.kernels) if getattr(config.kernels, part.name) == "liger"]


def check_kernels(config: Config) -> None:
    """Refuses kernels that the model cannot have.

    Raises:
        ConfigError: for the first such key.
    """
    loss, changed = config.kernels.loss, _changed_after_head(config)
    if loss in ("chunked", "liger") and changed:
        why = f"the model changes its logits after the head (model.config.{changed}), where it has none; use logits"
        refuse("kernels.loss", loss, why)
    name, family, given = _model(config)
    for part in liger_parts(config):
        if part == "loss":
            continue
        key = f"kernels.{part}"
        if part not in family.liger:
            refuse(key, "liger", f"Liger's kernels for {name} are {', '.join(family.liger) or 'none'}; use torch")
        if part == "swiglu" and given["hidden_act"] not in ("silu", "swish"):
            activation = f"model.config.hidden_act={show(given['hidden_act'])}"
            refuse(key, "liger", f"its kernel has silu inside, not {activation}; use torch")
        if part == "rope" and config.activation.checkpoint == "selective":
            why = "its kernel writes over the projections that activation.checkpoint=selective keeps"
            refuse(key, "liger", f"{why}; use torch, or activation.checkpoint=full")
        if config.precision.compile:
            refuse(key, "liger", "precision.compile=true writes kernels of its own for it; use torch, or compile=false")


def _changed_after_head(config: Config) -> str | None:
    """`field=value` of what changes the logits after the head, None where nothing does."""
    _, _, given = _model(config)
    changes = (f"{key}={show(given[key])}" for key, same in _AFTER_HEAD.items() if given.get(key, same[0]) not in same)
    return next(changes, None)


def _model(config: Config) -> tuple[str, Family, dict[str, Any]]:
    """Name of the family, the family, and the values of its fields."""
    given = model_fields(config.model)
    name = given["model_type"]
    return name, FAMILIES[name], {**FAMILIES[name].defaults, **given}
