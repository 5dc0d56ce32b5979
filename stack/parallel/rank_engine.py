"""What drives the stages of one rank, whatever shards their states: the base of `zero.py` and `replicated.py`."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from stack.config.schema import Config
from stack.models.build import Stage
from stack.parallel.mesh import Mesh
from stack.parallel.parts import Part, optimizer_state, parameter_names
from stack.plan.policies import SCHEDULES, state_names


class Stages(nn.ModuleList):
    """The stages of a rank as one module."""

    def forward(self, index: int, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self[index](*args, **kwargs)


class RankEngine(ABC):
    """The stages of a rank, driven microbatch by microbatch in any order.

    One step: inside `accumulate()` any interleaving of `forward` and `backward`, then `step(lr)`.
    """

    def __init__(self, stages: list[Stage], *, cfg: Config, mesh: Mesh):
        self.mesh, self.clip, self.stages = mesh, cfg.optim.grad_clip, stages
        self.module = Stages(stages)
        # Any: DeepSpeed hangs its state on the parameters.
        self.parameters: list[Any] = list(self.module.parameters())
        self.tied: Any = None
        """This rank's copy of a tied embedding, where the other copy is on another rank."""
        if mesh.tied_group is not None:
            self.tied = stages[0 if stages[0].first else -1].tied_weight()
        self.names = parameter_names(stages, self.tied)
        self.state_names = state_names(cfg)
        #: Whether states are in files but for one group of parts at a time.
        self.in_files = cfg.parallel.offload.optimizer == "nvme"
        #: Then autograd leaves whole gradients in place for the end of the step.
        self.splits = SCHEDULES[cfg.parallel.schedule].splits_backward
        for parameter in self.parameters:
            # What counts in the global norm: all but the second copy of a tied embedding. DeepSpeed reads the mark; by
            # itself it would leave out every parameter of later stages, silently.
            parameter.model_parallel = parameter is not self.tied or stages[0].first
            # Sums of many microbatches lose bits in bf16: autograd adds them in fp32 whatever the parameter's dtype.
            parameter.grad_dtype = torch.float32

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """What losses are multiplied by before their backward: 1, but for fp16."""

    @abstractmethod
    def accumulate(self) -> AbstractContextManager[None]:
        """Everything of a step but the update. On leaving, gradients are reduced."""

    @abstractmethod
    def step(self, lr: float) -> torch.Tensor:
        """Clips, updates, releases.

        Returns:
            The global gradient norm before clipping, over all stages (0-dimensional fp32); not finite where the update
            was skipped.
        """

    @abstractmethod
    def dtypes(self) -> dict[str, torch.dtype]:
        """Where each dtype is, read back from live tensors after a step."""

    @abstractmethod
    def reduced_gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        """The gradient of a parameter after `accumulate`, whole, in fp32. Collective over the data group."""

    @abstractmethod
    def master(self, parameter: nn.Parameter) -> torch.Tensor:
        """The fp32 master of a parameter, whole. Collective over the data group."""

    @abstractmethod
    def own_part(self, parameter: Any) -> torch.Tensor:
        """This rank's part of a parameter."""

    @property
    @abstractmethod
    def masters(self) -> list[torch.Tensor]:
        """The tensors that the optimizer updates: each group of parts is made of one or of all of them."""

    @property
    @abstractmethod
    def groups(self) -> int:
        """Groups of parts; the parts of one group are in memory together."""

    @abstractmethod
    def parts(self, group: int, *, load: bool) -> AbstractContextManager[list[Part]]:
        """Parts of a group, to be read or written until the context is left.

        Args:
            load: False gives what this rank saves, so that every element of every parameter is saved by exactly one
                rank. True gives everything that this rank holds, and on leaving takes it over into the parameters in
                use; `loaded` must follow.
        """

    @abstractmethod
    def loaded(self) -> None:
        """After all groups were loaded: brings the new parameters to whoever uses them. Collective over the data
        group."""

    @property
    @abstractmethod
    def scaling(self) -> tuple[float, int] | None:
        """fp16's loss scale, and the steps since its last overflow; None for other dtypes, which take none either."""

    @scaling.setter
    @abstractmethod
    def scaling(self, value: tuple[float, int] | None) -> None: ...

    @property
    @abstractmethod
    def torch_optimizer(self) -> Any:
        """torch's optimizer, whose `state` has an entry for each of `masters`."""

    @property
    def updates(self) -> int:
        """Updates that AdamW has made, which its bias correction depends on; 0 for an optimizer that does not count."""
        if "exp_avg" not in self.state_names:
            return 0
        counts = {int(self._state(master)["step"]) for master in self.masters}
        if len(counts) != 1:
            raise RuntimeError(f"parameters differ in the number of their updates: {sorted(counts)}")
        return counts.pop()

    @updates.setter
    def updates(self, count: int) -> None:
        if "exp_avg" in self.state_names:
            for master in self.masters:
                self._state(master)["step"].fill_(count)

    def _state(self, master: torch.Tensor) -> dict[str, Any]:
        return optimizer_state(self.torch_optimizer, master, self.state_names)

    def forward(self, index: int, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Runs the forward of this rank's stage number `index` (0, 1, ... in the order of the forward)."""
        output = self.module(index, *args, **kwargs)
        # A backward in two parts detaches the output in place, which torch cannot do to a view.
        return output.clone() if self.splits and output._is_view() else output

    def backward(self, output: torch.Tensor, gradient: torch.Tensor | None, *, last: bool) -> None:  # noqa: ARG002
        """Runs the backward of one microbatch through one stage.

        Args:
            output: the loss (0-dimensional) on the last stage, else the hidden states that were sent on.
            gradient: None on the last stage, else the gradient of `output`.
            last: whether this is the step's last backward of that stage.
        """
        torch.autograd.backward(output, gradient)

    def backward_input(
        self, index: int, output: Sequence[torch.Tensor], gradients: list[torch.Tensor] | None, values: list[Any]
    ) -> list[dict[str, Any]]:
        """The part of a backward that the neighbours wait for: gradients of a stage's inputs, left in their `.grad`.

        Returns:
            What `backward_weight` needs.
        """
        _, groups = stage_backward_input(list(output), gradients, values, self.stages[index].parameters())
        return groups

    def backward_weight(self, index: int, groups: list[dict[str, Any]]) -> None:
        """The rest of that backward: gradients of the stage's parameters, added to what is there in fp32."""
        parameters: list[Any] = list(self.stages[index].parameters())
        sums = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad, parameter.grad_dtype = None, parameter.dtype
        stage_backward_weight(iter(parameters), groups)
        for parameter, before in zip(parameters, sums, strict=True):
            gradient, parameter.grad, parameter.grad_dtype = parameter.grad, None, torch.float32
            if before is None:
                parameter.grad = None if gradient is None else gradient.float()
            else:
                parameter.grad = before if gradient is None else before.add_(gradient)

    @contextlib.contextmanager
    def evaluate(self) -> Iterator[None]:
        """Forwards only, in evaluation mode."""
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()

    def check_tied(self) -> None:
        """Compares the two copies of a tied embedding, this rank's part of it. Collective over its two holders.

        Raises:
            RuntimeError: on one holder at least, where they differ.
        """
        if self.tied is None:
            return
        mine = self.own_part(self.tied).to(self.mesh.device)
        larger = mine.clone()
        dist.all_reduce(larger, dist.ReduceOp.MAX, group=self.mesh.tied_group)
        if not torch.equal(larger, mine):
            raise RuntimeError("the first and the last stage no longer hold the same tied embedding")

    def sum_tied(self, gradients: list[torch.Tensor]) -> None:
        """Adds up, in place, the gradients of the two copies of a tied embedding: the same part of it on both sides."""
        for gradient in gradients:
            # An offloaded gradient is on the CPU, which NCCL cannot reach.
            total = gradient.to(self.mesh.device)
            dist.all_reduce(total, group=self.mesh.tied_group)
            if total is not gradient:
                gradient.copy_(total)
