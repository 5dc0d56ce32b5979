"""The form in which a rank hands its state to a checkpoint: contiguous parts of parameters and of optimizer state."""

from dataclasses import dataclass
from typing import Any

import torch

from stack.models.build import Stage
from stack.plan.policies import MASTER


@dataclass(frozen=True)
class Part:
    """A contiguous part of one flattened parameter."""

    name: str
    """Hugging Face name of the parameter; both copies of a tied embedding have the embedding's."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the part in the flattened parameter."""
    states: dict[str, torch.Tensor]
    """Name of a state -> fp32 [length], a view of the optimizer's tensor. `MASTER` comes first."""

    @property
    def length(self) -> int:
        """Number of elements."""
        return self.states[MASTER].numel()


def parameter_names(stages: list[Stage], tied: torch.Tensor | None) -> dict[int, str]:
    """`id` of each of a rank's parameters -> its Hugging Face name.

    Args:
        stages: this rank's stages.
        tied: this rank's copy of a tied embedding, if the other copy is on another rank; both copies get the name of
            the embedding.
    """
    names: dict[int, str] = {}
    for stage in stages:
        for name, parameter in stage.model.named_parameters():
            names.setdefault(id(parameter), f"{stage.parts.embedding}.weight" if parameter is tied else name)
    return names


def optimizer_state(optimizer: torch.optim.Optimizer, master: torch.Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """The optimizer's state for one master. torch has none before the first update; then this makes the zeros from
    which torch would start.

    Args:
        optimizer: AdamW or SGD of torch.
        master: a tensor that the optimizer updates.
        names: `state_names` of the run.
    """
    state = optimizer.state[master]
    for name in names:
        if name != MASTER and name not in state:
            state[name] = torch.zeros_like(master)
    if "exp_avg" in names and "step" not in state:
        # AdamW counts updates for each tensor. The counter is on the device if the kernel is fused, else on the host.
        device = master.device if optimizer.defaults["fused"] else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    return state
