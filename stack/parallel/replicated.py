"""What DeepSpeed leaves to its caller at ZeRO stage 0: averages over replicas, fp32 masters, the norm, clipping."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist


def global_norm(gradients: list[torch.Tensor], *groups: dist.ProcessGroup) -> torch.Tensor:
    """L2 norm (0-dimensional fp32) of fp32 gradients here and on all ranks of the groups' product. Collective."""
    squared = torch.nn.utils.get_total_norm(gradients).float().square()
    for group in groups:
        dist.all_reduce(squared, group=group)
    return squared.sqrt()


def clip(parameters: Iterable[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scales gradients in place so that their global norm is at most `limit`; 0 does not clip.

    The coefficient is limit / (norm + 1e-6), at most 1, as in torch.nn.utils.clip_grad_norm_ and DeepSpeed.
    """
    if limit > 0:
        coefficient = torch.clamp(limit / (norm + 1e-6), max=1.0)
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], coefficient)


def average(gradients: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Replaces gradients, in place, by their means over the group. Collective."""
    for work in [dist.all_reduce(gradient, group=group, async_op=True) for gradient in gradients]:
        work.wait()
    torch._foreach_div_(gradients, dist.get_world_size(group))


@functools.cache
def on_masters(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The optimizer class `kind` on fp32 masters of parameters in any dtype, with their fp32 gradients.

    A master of an fp32 parameter is the parameter itself.
    """

    class OnMasters(kind):  # type: ignore[misc, valid-type]
        def __init__(self, groups: list[dict[str, Any]], **options: Any):
            self._live = [p for group in groups for p in group["params"]]
            self._masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self._live]
            master_of = dict(zip(map(id, self._live), self._masters, strict=True))
            super().__init__([{**g, "params": [master_of[id(p)] for p in g["params"]]} for g in groups], **options)

        @property
        def live_and_masters(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            """The model's parameters, and in the same order what they are cast from."""
            return self._live, self._masters

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> None:
            pairs = [
                (live, master) for live, master in zip(self._live, self._masters, strict=True) if live is not master
            ]
            for live, master in pairs:
                master.grad = live.grad
            super().step(closure)
            for live, master in pairs:
                live.copy_(master)
                master.grad = None

    return OnMasters
