"""The base class of the engines that run the stages of one rank; `zero.py` and `replicated.py` implement it."""

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
    """The stages of a rank as one module; `forward` runs stage number `index`."""

    def forward(self, index: int, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self[index](*args, **kwargs)


class RankEngine(ABC):
    """Runs the stages of a rank, one microbatch at a time and in any order, and updates their parameters.

    A step is any interleaving of `forward` and `backward` inside `accumulate()`, followed by `step(lr)`.
    """

    def __init__(self, stages: list[Stage], *, cfg: Config, mesh: Mesh):
        self.mesh, self.clip, self.stages = mesh, cfg.optim.grad_clip, stages
        self.module = Stages(stages)
        # Typed as Any because DeepSpeed adds attributes to the parameters.
        self.parameters: list[Any] = list(self.module.parameters())
        self.tied: Any = None
        """This rank's copy of a tied embedding, if the other copy is on another rank, else None."""
        if mesh.tied_group is not None:
            self.tied = stages[0 if stages[0].first else -1].tied_weight()
        self.names = parameter_names(stages, self.tied)
        self.state_names = state_names(cfg)
        #: Whether the states are kept in files, and only one group of parts is in memory at a time.
        self.in_files = cfg.parallel.offload.optimizer == "nvme"
        #: Whether the schedule computes weight gradients separately. Gradients then stay whole in `.grad` until the end
        #: of the step.
        self.splits = SCHEDULES[cfg.parallel.schedule].splits_backward
        for parameter in self.parameters:
            # Marks the parameters that count in the global norm: all except the second copy of a tied embedding.
            # DeepSpeed reads the mark. Without it, the norm would leave out every parameter of later stages, without a
            # message.
            parameter.model_parallel = parameter is not self.tied or stages[0].first
            # autograd adds the gradients of microbatches in fp32, because sums of many of them in bf16 lose bits.
            parameter.grad_dtype = torch.float32

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """The factor by which losses are multiplied before their backward; 1 except in fp16."""

    @abstractmethod
    def accumulate(self) -> AbstractContextManager[None]:
        """A context for all forwards and backwards of a step. When it ends, gradients are reduced. Collective over the
        data group."""

    @abstractmethod
    def step(self, lr: float) -> torch.Tensor:
        """Clips the gradients, updates the parameters at learning rate `lr`, and releases gathered parameters and
        gradients. Collective over all ranks.

        Returns:
            The global gradient norm before clipping, over all stages (0-dimensional fp32); not finite where the update
            was skipped.
        """

    @abstractmethod
    def dtypes(self) -> dict[str, torch.dtype]:
        """Kind of tensor, such as "masters" or "gradient sums" -> dtype, read from live tensors after a step."""

    @abstractmethod
    def reduced_gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        """The whole gradient of a parameter after `accumulate`, fp32 in the parameter's shape, without the loss scale.
        Collective over the data group."""

    @abstractmethod
    def master(self, parameter: nn.Parameter) -> torch.Tensor:
        """The whole fp32 master of a parameter, in the parameter's shape. Collective over the data group."""

    @abstractmethod
    def own_part(self, parameter: Any) -> torch.Tensor:
        """This rank's shard of a parameter in use; the whole parameter below ZeRO-3."""

    @property
    @abstractmethod
    def masters(self) -> list[torch.Tensor]:
        """The fp32 tensors that the optimizer updates. A group of parts consists of views of one of them (ZeRO), or of
        all of them (no ZeRO)."""

    @property
    @abstractmethod
    def groups(self) -> int:
        """Number of groups of parts; the parts of one group are in memory together."""

    @abstractmethod
    def parts(self, group: int, *, load: bool) -> AbstractContextManager[list[Part]]:
        """A context that yields the parts of a group, to be read or written inside it.

        Args:
            group: number of the group, from 0.
            load: with False, yields the parts that this rank saves; every element of every parameter is saved by
                exactly one rank. With True, yields all parts that this rank holds, and at the end casts them into the
                parameters in use; `loaded` must be called afterwards.
        """

    @abstractmethod
    def loaded(self) -> None:
        """Must be called after all groups were loaded: distributes the new parameters over the data group. Collective
        over the data group."""

    @property
    @abstractmethod
    def scaling(self) -> tuple[float, int] | None:
        """(loss scale, steps since the last overflow) in fp16, else None. Setting it has no effect in other dtypes."""

    @scaling.setter
    @abstractmethod
    def scaling(self, value: tuple[float, int] | None) -> None: ...

    @property
    @abstractmethod
    def torch_optimizer(self) -> Any:
        """torch's optimizer; its `state` has an entry for each of `masters`."""

    @property
    def updates(self) -> int:
        """Number of updates that AdamW has made, on which its bias correction depends; 0 for SGD, which does not count.

        Raises:
            RuntimeError: parameters have different numbers of updates.
        """
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
        """Runs the forward of this rank's stage number `index` (0, 1, ... in the order of the forward); arguments and
        result are those of `Stage.forward`."""
        output = self.module(index, *args, **kwargs)
        # A schedule that splits the backward detaches the output in place, which torch cannot do to a view.
        return output.clone() if self.splits and output._is_view() else output

    def backward(self, output: torch.Tensor, gradient: torch.Tensor | None, *, last: bool) -> None:  # noqa: ARG002
        """Runs the backward of one microbatch through one stage.

        Args:
            output: the loss (0-dimensional) on the last stage, else the hidden states that the stage sent.
            gradient: None on the last stage, else the gradient of `output`.
            last: whether this is the step's last backward of that stage.
        """
        torch.autograd.backward(output, gradient)

    def backward_input(
        self, index: int, output: Sequence[torch.Tensor], gradients: list[torch.Tensor] | None, values: list[Any]
    ) -> list[dict[str, Any]]:
        """The first part of a split backward: the gradients of a stage's inputs, for which the stage before waits.

        Args:
            index: number of this rank's stage.
            output: the outputs of the stage.
            gradients: the gradients of the outputs; None on the last stage.
            values: the inputs of the stage; their gradients are left in `.grad`.

        Returns:
            The groups of autograd nodes that `backward_weight` needs.
        """
        _, groups = stage_backward_input(list(output), gradients, values, self.stages[index].parameters())
        return groups

    def backward_weight(self, index: int, groups: list[dict[str, Any]]) -> None:
        """The second part of a split backward: the gradients of the stage's parameters, added in fp32 to `.grad`."""
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
        """A context for forwards without gradients, in evaluation mode."""
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()

    def check_tied(self) -> None:
        """Compares this rank's part of a tied embedding with the other copy. Collective over the two holders.

        Raises:
            RuntimeError: the copies differ. Raised on at least one of the holders.
        """
        if self.tied is None:
            return
        mine = self.own_part(self.tied).to(self.mesh.device)
        larger = mine.clone()
        dist.all_reduce(larger, dist.ReduceOp.MAX, group=self.mesh.tied_group)
        if not torch.equal(larger, mine):
            raise RuntimeError("the first and the last stage no longer hold the same tied embedding")

    def sum_tied(self, gradients: list[torch.Tensor]) -> None:
        """Replaces the gradients of the two copies of a tied embedding by their sum, in place. Both holders pass the
        same part. Collective over the two holders."""
        for gradient in gradients:
            # An offloaded gradient is on the CPU, and NCCL reduces only tensors on a GPU.
            total = gradient.to(self.mesh.device)
            dist.all_reduce(total, group=self.mesh.tied_group)
            if total is not gradient:
                gradient.copy_(total)
