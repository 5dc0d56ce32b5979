"""What W&B's variables in the environment say of a run, beside the config."""

import os

#: What values of WANDB_MODE are called in `log.wandb.mode`; all others are taken for `disabled`.
_MODES = {"online": "online", "run": "online", "shared": "shared", "offline": "offline", "dryrun": "offline"}
#: Variables that speak of what `log.wandb.mode` decides.
DECIDED = ("WANDB_DISABLED", "WANDB_MODE")
_FALSE = ("", "0", "false", "no", "off")


def agents_run_id() -> str | None:
    """The id that `wandb agent` has given to the run that it started. WANDB_RUN_ID without an agent is in a user's
    environment for every run, and would make one W&B run of them all."""
    return os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None


def passed_over(mode: str) -> list[str]:
    """A line for each variable that contradicts the config.

    Args:
        mode: `log.wandb.mode`, which decides.
    """
    lines = []
    name, value = "WANDB_DISABLED", os.environ.get("WANDB_DISABLED", "")
    asked: str | None = "disabled"
    if value.lower() in _FALSE:
        name, value = "WANDB_MODE", os.environ.get("WANDB_MODE", "")
        asked = _MODES.get(value.lower(), "disabled") if value else None
    if asked not in (None, mode):
        lines.append(f"{name}={value} is passed over, since log.wandb.mode={mode} decides; set log.wandb.mode={asked}")
    if mode != "disabled" and "WANDB_RUN_ID" in os.environ and agents_run_id() is None:
        lines.append(
            f"WANDB_RUN_ID={os.environ['WANDB_RUN_ID']} is passed over, since every run directory is a W&B run of its "
            "own; only the runs of `wandb agent` are named by it"
        )
    return lines
