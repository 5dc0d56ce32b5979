"""Checks the section `kernels` against the model, and resolves `kernels.loss=auto`.

Whether a host has the required GPU and packages is checked when the ranks start.
"""

from dataclasses import fields
from typing import Any

from stack.config.families import FAMILIES, Family
from stack.config.model_folder import model_fields
from stack.config.schema import Config
from stack.config.values import refuse, show

#: Fields that scale or cap the logits after the head -> values of the field that leave the logits unchanged.
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
    """Names of the keys of `kernels` that are set to liger."""
    return [part.name for part in fields(config.kernels) if getattr(config.kernels, part.name) == "liger"]


def check_kernels(config: Config) -> None:
    """Checks that the chosen kernels can compute the model.

    Raises:
        ConfigError: a kernel cannot; raised for the first such key.
    """
    loss, changed = config.kernels.loss, _changed_after_head(config)
    if loss in ("chunked", "liger") and changed:
        why = f"it cannot change logits after the head, as model.config.{changed} requires; use logits"
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
            refuse(key, "liger", f"its kernel computes silu, not {activation}; use torch")
        if part == "rope" and config.activation.checkpoint == "selective":
            why = "its kernel writes over the projections that activation.checkpoint=selective keeps"
            refuse(key, "liger", f"{why}; use torch, or activation.checkpoint=full")
        if config.precision.compile:
            why = "precision.compile=true generates its own kernel for this part"
            refuse(key, "liger", f"{why}; use torch, or precision.compile=false")


def _changed_after_head(config: Config) -> str | None:
    """`field=value` for a field that scales or caps the logits after the head; None if no field does."""
    _, _, given = _model(config)
    changes = (f"{key}={show(given[key])}" for key, same in _AFTER_HEAD.items() if given.get(key, same[0]) not in same)
    return next(changes, None)


def _model(config: Config) -> tuple[str, Family, dict[str, Any]]:
    """The model's family name, family, and fields with their values, defaults included."""
    given = model_fields(config.model)
    name = given["model_type"]
    return name, FAMILIES[name], {**FAMILIES[name].defaults, **given}
