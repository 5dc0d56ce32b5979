"""Runs a rank's engine under a schedule of torch.distributed.pipelining, and measures when the rank computes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import (
    FORWARD,
    FULL_BACKWARD,
    _Action,
    _batch_p2p,
    _PipelineSchedule,
    _PipelineScheduleRuntime,
    _wait_batch_p2p,
)

from stack.parallel.clock import StepClock
from stack.parallel.mesh import Mesh
from stack.parallel.rank_engine import RankEngine
from stack.plan.layout import Plan


class Schedule1F1B(_PipelineScheduleRuntime):
    """1F1B (Narayanan et al. 2019) with communication during the computation, whereas torch's own class waits for each
    send and receive.

    A rank posts a receive when the sender is about to send, and waits for it when it needs the tensor. It waits for a
    send only when it needs the buffer again. Both ranks of a pair post their transfers in the same order, so neither
    waits for a transfer that the other posts later.
    """

    def __init__(self, stages: list[PipelineStage], microbatches: int, **options: Any):
        super().__init__(stages, microbatches, **options)
        pipeline = stages[0].group_size
        self._prepare_schedule_with_comms(
            {rank: [*order_1f1b(rank, pipeline, microbatches)] for rank in range(pipeline)}
        )


def order_1f1b(rank: int, pipeline: int, microbatches: int) -> list[_Action]:
    """The order of computations of one rank of the pipe: `pipeline - 1 - rank` forwards, then forwards and backwards in
    turn, then the remaining backwards."""
    ahead = min(pipeline - 1 - rank, microbatches)
    order = [_Action(rank, FORWARD, microbatch) for microbatch in range(ahead)]
    for microbatch in range(microbatches):
        if microbatch + ahead < microbatches:
            order.append(_Action(rank, FORWARD, microbatch + ahead))
        order.append(_Action(rank, FULL_BACKWARD, microbatch))
    return order


#: Name of a schedule in `stack.plan.policies` -> its class.
_CLASSES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "gpipe": ScheduleGPipe,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def make_schedule(
    engine: RankEngine,
    *,
    plan: Plan,
    mesh: Mesh,
    dtype: torch.dtype,
    loss_scale: Callable[[], float],
    clock: Callable[[], StepClock],
) -> "Pipeline":
    """The `Pipeline` that runs this rank's stages under the schedule of the plan.

    Args:
        engine: this rank's engine.
        plan: the layout.
        mesh: this rank's process groups.
        dtype: of the hidden states that are sent between stages.
        loss_scale: returns the factor for the summed token loss of a microbatch; called for every microbatch.
        clock: returns the clock of the current step.
    """
    hidden = torch.empty(plan.micro_size, plan.seq_len, plan.shape.hidden, device="meta", dtype=dtype)
    tokens = torch.empty(plan.micro_size, plan.seq_len, device="meta", dtype=torch.long)

    def stage(index: int, number: int) -> _EngineStage:
        # The shapes are given, because torch would infer them by a forward and a backward through ZeRO's hooks.
        last = number == plan.stages - 1
        made = _EngineStage(
            _Forward(engine, index),
            number,
            plan.stages,
            mesh.device,
            input_args=(tokens if number == 0 else hidden.detach().requires_grad_(),),
            output_args=(torch.empty((), device="meta") if last else hidden.detach().requires_grad_(),),
            group=mesh.transfer_group,
        )
        made.drive(engine, index, clock, window=plan.pipeline if plan.schedule == "1f1b" else plan.microbatches)
        return made

    stages = [stage(index, number) for index, number in enumerate(plan.stages_of(mesh.pipe_rank))]
    schedule = _CLASSES[plan.schedule](
        stages[0] if plan.schedule == "gpipe" else stages,
        plan.microbatches,
        loss_fn=lambda total, _labels: total * loss_scale(),
        scale_grads=False,
    )
    return Pipeline(schedule, stages)


class Pipeline:
    """Runs all microbatches of a step, or of an evaluation, through this rank's stages."""

    def __init__(self, schedule: _PipelineSchedule, stages: "list[_EngineStage]"):
        self._schedule, self.stages = schedule, stages

    def train(self, *args: torch.Tensor, **inputs: Any) -> None:
        """Runs forwards and backwards. Arguments are those of `Stage.forward`, for all microbatches; on the last stage
        also `target` and `losses`, as in torch's schedules."""
        self._schedule.step(*args, return_outputs=False, **inputs)
        self._finish()

    def evaluate(self, *args: torch.Tensor, **inputs: Any) -> None:
        """Runs forwards only, with the arguments of `train`."""
        self._schedule.eval(*args, return_outputs=False, **inputs)
        self._finish()

    def _finish(self) -> None:
        for stage in self.stages:
            stage.finish_sending()
            # torch would keep the outputs of an evaluation until the next step.
            stage.clear_runtime_states()


class _Forward(nn.Module):
    """A stage of the engine as a module without parameters, so that torch's pipelining does not move, count or scale
    parameters that ZeRO manages."""

    def __init__(self, engine: RankEngine, index: int):
        super().__init__()
        self._forward, self._index = engine.forward, index

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self._forward(self._index, *args, **kwargs)


class _EngineStage(PipelineStage):
    """A pipeline stage whose forward and backward go through the rank's engine."""

    def drive(self, engine: RankEngine, index: int, clock: Callable[[], StepClock], *, window: int) -> None:
        """Sets the engine that the stage runs on.

        Args:
            engine: this rank's engine.
            index: number of this stage within the rank.
            clock: returns the clock of the current step.
            window: number of microbatches that may be between their forward and their backward.
        """
        self._engine, self._index, self._clock, self._window = engine, index, clock, window
        self._sending: dict[tuple[str, int], list[dist.Work]] = {}

    # torch makes receive buffers for every microbatch of a step, and makes them anew whenever training and evaluation
    # take turns. Here they are made once, and microbatches that are `window` apart share them.

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        if not self.args_recv_info:
            super()._setup_forward_recv_info(min(self._window, num_microbatches), has_backward)
            self._share(self.args_recv_info, num_microbatches)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        if not self.grad_recv_info:
            super()._setup_backward_recv_info(min(self._window, num_microbatches))
            self._share(self.grad_recv_info, num_microbatches)
        self.chunks = num_microbatches

    def _share(self, buffers: dict[int, Any], microbatches: int) -> None:
        for microbatch in range(len(buffers), microbatches):
            buffers[microbatch] = buffers[microbatch % self._window]

    # A schedule of torch would keep all sent tensors until the end of the step. The stage sends them itself, and
    # releases each one as soon as it is received.

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._sending["forward", fwd_chunk_id] = _batch_p2p(super().get_fwd_send_ops(fwd_chunk_id))
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._sending["backward", bwd_chunk_id] = _batch_p2p(super().get_bwd_send_ops(bwd_chunk_id))
        return []

    def _sent(self, direction: str, microbatch: int) -> None:
        _wait_batch_p2p(self._sending.pop((direction, microbatch), []))

    def finish_sending(self) -> None:
        """Waits for the sends that have not finished."""
        for transfer in list(self._sending):
            self._sent(*transfer)

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock().busy():
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        # Both sends have arrived by now, so the waits only release their tensors. The gradient of this microbatch is
        # here, so the next stage has its hidden states. The stage before has used the gradient of `window` microbatches
        # ago.
        self._sent("forward", bwd_chunk_id)
        self._sent("backward", bwd_chunk_id - self._window)
        with self._clock().busy():
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        with self._clock().busy():
            super().backward_weight_one_chunk(*args, **kwargs)

    # For two stages on one rank torch passes gradients on in an evaluation too, although there are none.

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[torch.Tensor | None, ...], mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[torch.Tensor | None, ...], list[dict[str, Any]] | None]:
        """Replaces torch's backward by the engine's, which works with ZeRO."""
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
    """The gradients of the received tensors, which are removed from `.grad`: receive buffers stay alive, and would keep
    a gradient for every microbatch of a step."""
    tensors = [value if isinstance(value, torch.Tensor) else None for value in values]
    received = tuple(None if tensor is None else tensor.grad for tensor in tensors)
    for tensor in tensors:
        if tensor is not None:
            tensor.grad = None
    return received
