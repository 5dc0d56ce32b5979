"""The result of an optimizer step, which a device may still be working on."""

import math
import resource
from dataclasses import dataclass

import torch
import torch.distributed as dist

from stack.parallel.clock import StepClock
from stack.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step; the same on every rank.

    loss: mean token loss over the targets of the global batch, in nats, before the update.
    grad_norm: global L2 norm before clipping; not finite where the update was skipped.
    tokens: targets in the global batch.
    lr: learning rate of the update.
    step_time_s: seconds of the slowest rank; on a GPU the time of the device, without work of the host beside it.
    bubble_fraction: share of the step in which a stage waited for its neighbours, mean over the ranks.
    stage_busy_s: seconds of forwards and backwards of each rank of the pipe, mean over its replicas.
    memory_peak_bytes: largest peak of any rank since it started (device memory, or resident memory on the CPU).
    router_aux_loss: the auxiliary loss that balances the experts of a mixture, times its coefficient; None for models
        without experts.
    loss_scale: the factor of the loss in fp16 in this step; None for other dtypes.
    stop: whether any rank had been asked to end the run when it called `RunningStep.result`.
    """

    loss: float
    grad_norm: float
    tokens: int
    lr: float
    step_time_s: float
    bubble_fraction: float
    memory_peak_bytes: int
    stage_busy_s: tuple[float, ...]
    router_aux_loss: float | None = None
    loss_scale: float | None = None
    stop: bool = False

    @property
    def skipped(self) -> bool:
        """Whether the update was skipped because of an overflow in fp16. The loss scale is then halved, and the run
        goes on."""
        return self.loss_scale is not None and not math.isfinite(self.grad_norm)


class RunningStep:
    """A step that the host has queued on the device. Only `result` waits for the device."""

    def __init__(
        self,
        clock: StepClock,
        *,
        mesh: Mesh,
        losses: list[torch.Tensor],
        auxiliary: list[torch.Tensor] | None,
        grad_norm: torch.Tensor,
        tokens: int,
        lr: float,
        loss_scale: float | None,
    ):
        """
        Args:
            clock: the clock of the step.
            mesh: this rank's process groups.
            losses: scaled token losses (0-dimensional) of this rank's microbatches; empty on all stages but the last.
            auxiliary: `Router.take` of this rank's routers; None for a model without experts.
            grad_norm: global norm before clipping, 0-dimensional.
            tokens: targets in the global batch.
            lr: learning rate of the update.
            loss_scale: the factor of the loss in fp16, else None.
        """
        self._clock, self._mesh, self._routed = clock, mesh, auxiliary is not None
        self._tokens, self._lr, self._loss_scale = tokens, lr, loss_scale
        numbers = torch.stack([_total(losses, mesh.device), _total(auxiliary or [], mesh.device), grad_norm.double()])
        # A copy into pinned memory is queued on the device like the rest of the step; the host does not wait for it.
        self._numbers = torch.empty(3, dtype=torch.float64, pin_memory=mesh.device.type == "cuda")
        self._numbers.copy_(numbers, non_blocking=True)
        clock.end()

    def result(self, stop: bool = False) -> StepResult:
        """Waits for the step and returns its result. Collective over all ranks.

        One small all-gather collects the numbers of all ranks. It runs on the host, because on the device it would be
        queued behind the next step.

        Args:
            stop: whether this rank was asked to end the run; all ranks get to know it in the same step.
        """
        self._clock.wait()
        loss, auxiliary, grad_norm = self._numbers.tolist()
        took = self._clock.step_s()
        peak, idle = self._memory_peak(), self._clock.idle_s() / took
        place, busy = self._mesh.pipe_rank, self._clock.busy_s()
        mine = torch.tensor([loss, idle, took, peak, auxiliary, place, busy, stop], dtype=torch.float64)
        flat = torch.empty(dist.get_world_size() * mine.numel(), dtype=mine.dtype)
        dist.all_gather_into_tensor(flat, mine, group=self._mesh.host_group)
        table = flat.view(-1, mine.numel())
        return StepResult(
            # The losses were multiplied by the number of replicas, because ZeRO averages the gradients.
            loss=float(table[:, 0].sum()) / self._mesh.replicas,
            grad_norm=grad_norm,
            tokens=self._tokens,
            lr=self._lr,
            step_time_s=float(table[:, 2].max()),
            bubble_fraction=float(table[:, 1].mean()),
            memory_peak_bytes=int(table[:, 3].max()),
            stage_busy_s=tuple(float(table[table[:, 5] == p, 6].mean()) for p in range(self._mesh.pipeline)),
            router_aux_loss=float(table[:, 4].sum()) / self._tokens if self._routed else None,
            loss_scale=self._loss_scale,
            stop=bool(table[:, 7].any()),
        )

    def _memory_peak(self) -> float:
        if self._mesh.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._mesh.device))
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _total(losses: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum over the microbatches (0-dimensional fp64); 0 where there are none."""
    if not losses:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([loss.detach() for loss in losses]).double().sum()
