"""The logical state of a run, as one rank holds it: contiguous parts of parameters and of their optimizer state."""

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
    """Of the whole parameter."""
    start: int
    """First element of the part in the flattened parameter."""
    states: dict[str, torch.Tensor]
    """fp32 [length] by name, `MASTER` first: views of what the optimizer holds."""

    @property
    def length(self) -> int:
        """Elements of the part."""
        return self.states[MASTER].numel()


def parameter_names(stages: list[Stage], tied: torch.Tensor | None) -> dict[int, str]:
    """Hugging Face names of a rank's parameters by their `id`.

    Args:
        tied: this rank's copy of a tied embedding, where the other copy is on another rank.
    """
    names: dict[int, str] = {}
    for stage in stages:
        for name, parameter in stage.model.named_parameters():
            names.setdefault(id(parameter), f"{stage.parts.embedding}.weight" if parameter is tied else name)
    return names


def optimizer_state(optimizer: torch.optim.Optimizer, master: torch.Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """The optimizer's entry for a master. Before the first update torch has none: then the zeros it would start from.

    Args:
        names: `state_names`.
    """
    state = optimizer.state[master]
    for name in names:
        if name != MASTER and name not in state:
            state[name] = torch.zeros_like(master)
    if "exp_avg" in names and "step" not in state:
        # AdamW counts its updates per tensor: on the device where its kernel is fused, else on the host.
        device = master.device if optimizer.defaults["fused"] else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    return state
