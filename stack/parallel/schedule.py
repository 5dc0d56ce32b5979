"""Drives a stage's engine with a schedule of torch.distributed.pipelining, and measures when the stage computes."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from stack.parallel.mesh import Mesh
from stack.parallel.zero import ZeroEngine
from stack.plan.layout import Plan

SCHEDULES: dict[str, type[PipelineScheduleSingle]] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


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
    engine: ZeroEngine, *, plan: Plan, mesh: Mesh, dtype: torch.dtype, loss_scale: Callable[[], float], clock: BusyClock
) -> PipelineScheduleSingle:
    """The schedule of this rank's stage.

    Args:
        dtype: of the hidden states that cross a cut.
        loss_scale: what the summed token loss of a microbatch is multiplied by for the backward; asked each time.
    """
    hidden = torch.empty(plan.micro_size, plan.seq_len, plan.shape.hidden, device="meta", dtype=dtype)
    tokens = torch.empty(plan.micro_size, plan.seq_len, device="meta", dtype=torch.long)
    first, last = mesh.stage == 0, mesh.stage == mesh.stages - 1
    # Static shapes: letting torch infer them would run a forward and a backward through ZeRO's hooks.
    stage = _EngineStage(
        _Forward(engine),
        mesh.stage,
        mesh.stages,
        mesh.device,
        input_args=(tokens if first else hidden.requires_grad_(),),
        output_args=(torch.empty((), device="meta") if last else hidden.detach().requires_grad_(),),
        group=mesh.pipe_group,
    )
    stage.drive(engine, clock)
    return SCHEDULES[plan.schedule](
        stage, plan.microbatches, loss_fn=lambda total, _labels: total * loss_scale(), scale_grads=False
    )


class _Forward(nn.Module):
    """The engine as a module without parameters: torch must not move, count or scale what ZeRO owns."""

    def __init__(self, engine: ZeroEngine):
        super().__init__()
        self._forward = engine.forward

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self._forward(*args, **kwargs)


class _EngineStage(PipelineStage):
    """A pipeline stage whose backward goes through DeepSpeed."""

    def drive(self, engine: ZeroEngine, clock: BusyClock) -> None:
        self._engine, self._clock = engine, clock

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.busy():
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        with self._clock.busy():
            super().backward_one_chunk(*args, **kwargs)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[torch.Tensor | None, ...], None]:
        """Replaces torch's backward.

        Raises:
            RuntimeError: the schedule splits backwards, which goes around the hooks ZeRO reduces from.
        """
        if backward_type != "full":
            raise RuntimeError(f"a {backward_type} backward goes around ZeRO's gradient hooks")
        output, gradients = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
        if gradients is None:
            self._engine.backward(output, None, last=last_backward)
        else:
            self._engine.backward(output[0], gradients[0], last=last_backward)
        inputs = [v if isinstance(v, torch.Tensor) else None for v in bwd_kwargs["input_values"]]
        received = tuple(None if v is None else v.grad for v in inputs)
        for value in inputs:
            if value is not None:
                # The receive buffer lives on; the gradient must not, or a step keeps one for every microbatch.
                value.grad = None
        return received, None
