"""Drives a rank's engine with a schedule of torch.distributed.pipelining, and measures when it computes."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import _PipelineSchedule

from stack.parallel.mesh import Mesh
from stack.parallel.rank_engine import RankEngine
from stack.plan.layout import Plan
from stack.plan.policies import SCHEDULES

#: The classes behind the names in `stack.plan.policies`.
_CLASSES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "gpipe": ScheduleGPipe,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class BusyClock:
    """Seconds spent inside `busy()` since `reset()`: on the GPU by events, so that measuring waits for nothing."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        self._spans: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((start, self._now()))

    def seconds(self) -> float:
        """Total of the spans. On the GPU it waits for the last of them."""
        if not self._spans:
            return 0.0
        if not self._cuda:
            return sum(end - start for start, end in self._spans)
        self._spans[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in self._spans) / 1e3

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def make_schedule(
    engine: RankEngine, *, plan: Plan, mesh: Mesh, dtype: torch.dtype, loss_scale: Callable[[], float], clock: BusyClock
) -> _PipelineSchedule:
    """The schedule of this rank's stages.

    Args:
        dtype: of the hidden states that cross a cut.
        loss_scale: what the summed token loss of a microbatch is multiplied by for the backward; asked each time.
    """
    hidden = torch.empty(plan.micro_size, plan.seq_len, plan.shape.hidden, device="meta", dtype=dtype)
    tokens = torch.empty(plan.micro_size, plan.seq_len, device="meta", dtype=torch.long)

    def stage(index: int, number: int) -> _EngineStage:
        # Static shapes: letting torch infer them would run a forward and a backward through ZeRO's hooks.
        last = number == plan.stages - 1
        made = _EngineStage(
            _Forward(engine, index),
            number,
            plan.stages,
            mesh.device,
            input_args=(tokens if number == 0 else hidden.detach().requires_grad_(),),
            output_args=(torch.empty((), device="meta") if last else hidden.detach().requires_grad_(),),
            group=mesh.pipe_group,
        )
        made.drive(engine, index, clock, window=plan.pipeline if plan.schedule == "1f1b" else plan.microbatches)
        return made

    stages = [stage(index, number) for index, number in enumerate(plan.stages_of(mesh.pipe_rank))]
    return _CLASSES[plan.schedule](
        stages if SCHEDULES[plan.schedule].virtual else stages[0],
        plan.microbatches,
        loss_fn=lambda total, _labels: total * loss_scale(),
        scale_grads=False,
    )


class _Forward(nn.Module):
    """A stage of the engine as a module without parameters: torch must not move, count or scale what ZeRO owns."""

    def __init__(self, engine: RankEngine, index: int):
        super().__init__()
        self._forward, self._index = engine.forward, index

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self._forward(self._index, *args, **kwargs)


class _EngineStage(PipelineStage):
    """A pipeline stage whose forward and backward go through the rank's engine."""

    def drive(self, engine: RankEngine, index: int, clock: BusyClock, *, window: int) -> None:
        """Says what the stage runs, and how many microbatches it may hold between their forward and their backward."""
        self._engine, self._index, self._clock, self._window = engine, index, clock, window

    # Torch makes receive buffers for every microbatch of a step; those of one that is done serve a later one.

    def _prepare_forward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_forward_infra(num_microbatches, *args, **kwargs)
        self._share(self.args_recv_info)
        return result

    def _prepare_backward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_backward_infra(num_microbatches, *args, **kwargs)
        self._share(self.grad_recv_info)
        return result

    def _share(self, buffers: dict[int, Any]) -> None:
        for microbatch in buffers:
            buffers[microbatch] = buffers[microbatch % self._window]

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.busy():
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        with self._clock.busy():
            super().backward_one_chunk(*args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        with self._clock.busy():
            super().backward_weight_one_chunk(*args, **kwargs)

    # Between two stages of one rank torch hands gradients over in an evaluation too, where there are none.

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[torch.Tensor | None, ...], mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[torch.Tensor | None, ...], list[dict[str, Any]] | None]:
        """Replaces torch's backward, which knows nothing of ZeRO."""
        if backward_type == "weight":
            self._engine.backward_weight(self._index, bwd_kwargs["param_groups"])
            return (), None
        output, gradients, values = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"]
        if backward_type == "input":
            groups = self._engine.backward_input(self._index, output, gradients, values)
            return _taken(values), groups
        if gradients is None:
            self._engine.backward(output if isinstance(output, torch.Tensor) else output[0], None, last=last_backward)
        else:
            self._engine.backward(output[0], gradients[0], last=last_backward)
        return _taken(values), None


def _taken(values: list[Any]) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the received tensors. The receive buffers live on; their gradients must not, or a step keeps one
    for every microbatch."""
    tensors = [value if isinstance(value, torch.Tensor) else None for value in values]
    received = tuple(None if tensor is None else tensor.grad for tensor in tensors)
    for tensor in tensors:
        if tensor is not None:
            tensor.grad = None
    return received
