"""Reads W&B's environment variables, and finds those that contradict the config."""

import os

#: Value of WANDB_MODE -> value of `log.wandb.mode`. All other values count as `disabled`.
_MODES = {"online": "online", "run": "online", "shared": "shared", "offline": "offline", "dryrun": "offline"}
#: Variables for which the config has `log.wandb.mode`.
DECIDED = ("WANDB_DISABLED", "WANDB_MODE")
_FALSE = ("", "0", "false", "no", "off")


def agents_run_id() -> str | None:
    """The run id that `wandb agent` set, else None. WANDB_RUN_ID without an agent is ignored, because a user's
    environment sets it for all runs, which would then share one W&B run."""
    return os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None


def passed_over(mode: str) -> list[str]:
    """A line for the user for each environment variable that contradicts the config and is ignored.

    Args:
        mode: `log.wandb.mode`.
    """
    lines = []
    name, value = "WANDB_DISABLED", os.environ.get("WANDB_DISABLED", "")
    asked: str | None = "disabled"
    if value.lower() in _FALSE:
        name, value = "WANDB_MODE", os.environ.get("WANDB_MODE", "")
        asked = _MODES.get(value.lower(), "disabled") if value else None
    if asked not in (None, mode):
        lines.append(f"{name}={value} is ignored, since log.wandb.mode={mode} decides; set log.wandb.mode={asked}")
    if mode != "disabled" and "WANDB_RUN_ID" in os.environ and agents_run_id() is None:
        lines.append(
            f"WANDB_RUN_ID={os.environ['WANDB_RUN_ID']} is ignored, since every run directory is a W&B run of its "
            "own; only runs under `wandb agent` use this id"
        )
    return lines
