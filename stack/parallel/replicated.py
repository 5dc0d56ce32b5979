"""ZeRO stage 0: every replica holds all states of its stages. Nothing is sharded, so DeepSpeed is not used."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors

from stack.config.schema import Config
from stack.models.build import Stage
from stack.parallel.mesh import Mesh
from stack.parallel.norm import clip, global_norm
from stack.parallel.optimizer import make_optimizer, skip_unless_finite
from stack.parallel.parts import Part
from stack.parallel.rank_engine import RankEngine
from stack.plan.policies import MASTER, REPLICATED_BUCKET_BYTES


class ReplicatedEngine(RankEngine):
    """The engine for ZeRO stage 0, in plain torch. Every rank has the whole gradients, masters and optimizer state of
    its stages."""

    def __init__(self, stages: list[Stage], *, cfg: Config, mesh: Mesh):
        super().__init__(stages, cfg=cfg, mesh=mesh)
        self.optimizer: Any = make_optimizer(self.parameters, cfg, tied=self.tied, wrap=on_masters)
        self._fused = cfg.optim.fused
        self._scaler = LossScaler(dynamic=cfg.precision.dtype == "fp16")

    @property
    def loss_scale(self) -> float:
        return self._scaler.scale

    def backward(self, output: torch.Tensor, gradient: torch.Tensor | None, *, last: bool) -> None:
        # Scaled only on the last stage: the gradients that other stages receive are scaled already.
        super().backward(output if gradient is not None else output * self.loss_scale, gradient, last=last)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        yield
        average(self._gradients(), self.mesh.data_group)
        if self.tied is not None:
            self.sum_tied([self.tied.grad])

    def step(self, lr: float) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.loss_scale != 1:
            torch._foreach_div_(self._gradients(), self.loss_scale)
        counted = [p.grad for p in self.parameters if p.grad is not None and p.model_parallel]
        norm = global_norm(counted, self.mesh.pipe_group)
        clip(self._gradients(), norm, self.clip)
        if self._fused:
            skip_unless_finite(self.optimizer, norm)
        if self._fused or norm.isfinite():
            self.optimizer.step()
        if self._scaler.dynamic:
            self._scaler.update(overflow=not norm.isfinite())
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def dtypes(self) -> dict[str, torch.dtype]:
        masters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {
            "parameters": self.parameters[0].dtype,
            "masters": masters[0].dtype,
            "gradient sums": self.parameters[0].grad_dtype,
            "gradient reduction": self.parameters[0].grad_dtype,
            **{name: value.dtype for name, value in self.optimizer.state[masters[0]].items() if name != "step"},
        }

    def reduced_gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        assert parameter.grad is not None
        return parameter.grad / self.loss_scale

    def master(self, parameter: nn.Parameter) -> torch.Tensor:
        return self.optimizer.master_of[parameter].detach()

    def own_part(self, parameter: Any) -> torch.Tensor:
        return parameter.detach()

    @property
    def masters(self) -> list[torch.Tensor]:
        return list(self.optimizer.master_of.values())

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer

    @property
    def groups(self) -> int:
        return 1

    @contextlib.contextmanager
    def parts(self, group: int, *, load: bool) -> Iterator[list[Part]]:  # noqa: ARG002
        found = [self._part(parameter, load) for parameter in self.parameters]
        yield [part for part in found if part is not None]
        if load:
            with torch.no_grad():
                for live, master in self.optimizer.master_of.items():
                    live.copy_(master)

    def _part(self, parameter: Any, load: bool) -> Part | None:
        """The whole parameter with `load`, else the share that this replica saves; None where the share is empty."""
        master = self.optimizer.master_of[parameter]
        state = self._state(master)
        replica, replicas = (0, 1) if load else (self.mesh.replica, self.mesh.replicas)
        start, stop = (master.numel() * place // replicas for place in (replica, replica + 1))
        if start == stop or not (load or parameter.model_parallel):
            return None
        whole = {name: master.detach() if name == MASTER else state[name] for name in self.state_names}
        states = {name: tensor.view(-1)[start:stop] for name, tensor in whole.items()}
        return Part(self.names[id(parameter)], tuple(parameter.shape), start, states)

    def loaded(self) -> None:
        pass

    @property
    def scaling(self) -> tuple[float, int] | None:
        return (self._scaler.scale, self._scaler.since) if self._scaler.dynamic else None

    @scaling.setter
    def scaling(self, value: tuple[float, int] | None) -> None:
        if self._scaler.dynamic and value is not None:
            self._scaler.scale, self._scaler.since = value

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]


class LossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018): the scale is halved after an overflow, and doubled after
    `WINDOW` steps without one. Always 1 unless `dynamic`."""

    START, WINDOW = 2.0**16, 1000

    def __init__(self, *, dynamic: bool):
        self.dynamic = dynamic
        self.since = 0
        self.scale = self.START if dynamic else 1.0

    def update(self, *, overflow: bool) -> None:
        """Adjusts the scale after a step; `overflow` must be the same on all ranks."""
        self.since = 0 if overflow else self.since + 1
        if overflow:
            self.scale = max(self.scale / 2, 1.0)
        elif self.since % self.WINDOW == 0:
            self.scale *= 2


def average(gradients: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Replaces gradients by their means over the group, in place, in a few large collectives: hundreds of small ones
    take most of their time to start. Collective.

    Args:
        gradients: of any shapes; those of each dtype in the same order on every rank.
        group: the ranks to average over.
    """
    if dist.get_world_size(group) == 1:
        return
    for bucket in _take_tensors(gradients, REPLICATED_BUCKET_BYTES):
        # A tensor that is alone in its bucket is not copied.
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat, group=group)
        flat.div_(dist.get_world_size(group))
        torch._foreach_copy_(bucket, _unflatten_dense_tensors(flat, bucket))


def on_masters(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A subclass of the optimizer class `kind` that updates fp32 masters and copies them into the parameters.

    Parameters may have any dtype; their `.grad` must be fp32. The master of an fp32 parameter is the parameter itself.
    `master_of` maps parameters to masters.
    """

    class OnMasters(kind):  # type: ignore[misc, valid-type]
        def __init__(self, groups: Iterable[dict[str, Any]], **options: Any):
            groups = list(groups)
            live = [p for group in groups for p in group["params"]]
            self.master_of = {p: p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in live}
            super().__init__([{**g, "params": [self.master_of[p] for p in g["params"]]} for g in groups], **options)

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> None:
            pairs = [(live, master) for live, master in self.master_of.items() if live is not master]
            for live, master in pairs:
                master.grad = live.grad
            super().step(closure)
            for live, master in pairs:
                live.copy_(master)
                master.grad = None

    return OnMasters
