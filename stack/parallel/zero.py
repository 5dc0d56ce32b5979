"""One DeepSpeed engine per pipeline stage. The only file that touches DeepSpeed's private names.

DeepSpeed's own PipelineEngine refuses ZeRO-2 and 3. A plain DeepSpeedEngine over the stage's data group does not,
but it was written for one forward followed by one backward over the world. Each function here undoes one such
assumption; tests/dist/test_parity.py fails when one of them is left out.
"""

import contextlib
import importlib
import logging
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from deepspeed.utils import logger as deepspeed_logger
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from stack.config.deepspeed import deepspeed_zero_stage
from stack.config.schema import Config
from stack.models.build import Stage
from stack.parallel.mesh import Mesh, Mpu, local_device
from stack.parallel.optimizer import make_optimizer
from stack.parallel.replicated import average, clip, global_norm
from stack.plan.policies import SCHEDULES


def init_distributed(*, timeout: timedelta) -> None:
    """Starts torch.distributed through DeepSpeed: NCCL with GPUs, gloo without. Collective."""
    # On a CPU DeepSpeed compiles a shared-memory all-reduce at its first start. Nothing here calls it.
    # (By name: the attribute `deepspeed.comm.torch` is torch itself.)
    comm: Any = importlib.import_module("deepspeed.comm.torch")
    comm.build_shm_op = lambda: None
    deepspeed_logger.setLevel(logging.WARNING)
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timeout,
        verbose=False,
        auto_mpi_discovery=False,
    )


def close() -> None:
    """Waits for every rank and ends the groups. Collective."""
    dist.barrier()
    dist.destroy_process_group()


def shard(unit: nn.Module, *, mesh: Mesh, config: dict[str, Any]) -> None:
    """Partitions the parameters of `unit` over the stage's data group, as ZeRO-3 keeps them. Collective there.

    `zero.Init` by itself, or through transformers' HfDeepSpeedConfig, would partition over the world.
    """
    deepspeed.zero.Init(
        module=unit,
        data_parallel_group=mesh.data_group,
        config_dict_or_path=config,
        mpu=Mpu(mesh),
        dtype=next(unit.parameters()).dtype,
    )


class _Stages(nn.ModuleList):
    """The stages of a rank as the one module that its DeepSpeedEngine knows."""

    def forward(self, index: int, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self[index](*args, **kwargs)


class ZeroEngine:
    """The DeepSpeedEngine of a rank's stages, driven microbatch by microbatch in any order.

    One step: inside `accumulate()` any interleaving of `forward` and `backward`, then `step(lr)`.
    """

    def __init__(self, stages: list[Stage], *, cfg: Config, mesh: Mesh, config: dict[str, Any]):
        self._mesh, self._clip = mesh, cfg.optim.grad_clip
        self._zero, self._reduce_once = deepspeed_zero_stage(cfg), cfg.parallel.reduce == "step"
        self._holds = self._zero == 3 and cfg.parallel.gather == "step"
        # Then DeepSpeed sees neither forwards nor backwards: autograd leaves whole gradients for the end of the step.
        self._splits = SCHEDULES[cfg.parallel.schedule].splits_backward
        self._stages = stages
        self._in_flight: dict[nn.Module, Any] = {}
        module = _Stages(stages)
        # Any: DeepSpeed hangs its state on the parameters.
        self._parameters: list[Any] = list(module.parameters())
        self._gradient_dtype: torch.dtype | None = None
        tied: Any = stages[0 if stages[0].first else -1].tied_weight() if mesh.tied_group else None
        _scope_trace_check(mesh)
        for parameter in self._parameters:
            # Without the mark DeepSpeed counts only the first stage's parameters in the global norm, silently. The
            # second copy of a tied embedding must not count.
            parameter.model_parallel = parameter is not tied or stages[0].first
            # Sums of many microbatches lose bits in bf16: autograd adds them in fp32 whatever the parameter's dtype.
            parameter.grad_dtype = torch.float32
        if self._zero == 3:
            # One gather and one hook a decoder layer instead of one a projection.
            layers = {type(layer) for stage in stages for layer in stage.layers}
            deepspeed.utils.set_z3_leaf_modules(module, sorted(layers, key=str))
        optimizer = make_optimizer(self._parameters, cfg, tied=tied, masters=self._zero == 0)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, mpu=Mpu(mesh), config=config, dist_init_required=False
        )
        self._tied = tied
        if self._zero == 3:
            self._reduce_norm_once()
            if self._holds:
                # Parameters are gathered by `_gathered` instead of by a hook around each module in each microbatch.
                self.optimizer.parameter_offload._remove_module_hooks()
                for _, unit in self._units():
                    unit.register_forward_pre_hook(lambda module, _args: self._arrive(module))
        elif self._zero > 0:
            # ZeRO-2 would copy the fp32 sums through a buffer of the parameters' dtype before it reduces them.
            self.optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32

    def _units(self) -> Iterator[tuple[str, nn.Module]]:
        for stage in self._stages:
            yield from stage.units()

    @property
    def optimizer(self) -> Any:
        return self.engine.optimizer

    @property
    def loss_scale(self) -> float:
        """What DeepSpeed multiplies losses by before their backward: 1, but for fp16."""
        return 1.0

    def backward_input(
        self, index: int, output: Sequence[torch.Tensor], gradients: list[torch.Tensor] | None, values: list[Any]
    ) -> list[dict[str, Any]]:
        """The part of a backward that the neighbours wait for: gradients of a stage's inputs, left in their `.grad`.

        Returns:
            What `backward_weight` needs.
        """
        _, groups = stage_backward_input(list(output), gradients, values, self._stages[index].parameters())
        return groups

    def backward_weight(self, index: int, groups: list[dict[str, Any]]) -> None:
        """The rest of that backward: gradients of the stage's parameters, added to what is there in fp32."""
        parameters: list[Any] = list(self._stages[index].parameters())
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

    def forward(self, index: int, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Runs the forward of this rank's stage number `index` (0, 1, ... in the order of the forward)."""
        return (self.engine.module if self._splits else self.engine)(index, *args, **kwargs)

    def backward(self, output: torch.Tensor, gradient: torch.Tensor | None, *, last: bool) -> None:
        """Runs the backward of one microbatch through one stage.

        Args:
            output: the loss (0-dimensional) on the last stage, else the hidden states that were sent on.
            gradient: None on the last stage, else the gradient of `output`.
            last: whether this is the step's last backward of that stage.
        """
        if self._splits:
            torch.autograd.backward(output, gradient)
            return
        loss = output if gradient is None else _Surrogate.apply(output, gradient)
        # ZeRO-0 would reduce at the boundary: once for each stage of this rank. It reduces in `accumulate`.
        self.engine.set_gradient_accumulation_boundary(last and self._zero > 0)
        self.engine.backward(loss, scale_wrt_gas=False)
        if isinstance(self.optimizer, ZeROOptimizer):
            # Cleared only in forward otherwise: the second of two backwards in a row would overwrite, not add.
            self.optimizer.clear_backward_seen_flag()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Everything of a step but the update. Gradients are reduced on leaving, or in each backward."""
        once = self._zero > 0 and self._reduce_once
        with self._gathered(), self._reduced_once() if once else contextlib.nullcontext():
            yield
            if self._gradient_dtype is None:
                self._gradient_dtype = self._live_gradient_dtype()
        if self._zero == 0:
            average([p.grad for p in self._parameters if p.grad is not None], self._mesh.data_group)
        for gradient in self._tied_gradients():
            dist.all_reduce(gradient, group=self._mesh.tied_group)

    @contextlib.contextmanager
    def _reduced_once(self) -> Iterator[None]:
        """DeepSpeed's `coalesce_grad_reduction`, but for an error inside: its own reduces then too, and a rank that
        failed would wait for the others in a collective instead of saying so."""
        self.engine.inside_no_sync_ctxt = self.optimizer._coalesce_grad_reduction = True
        yield
        self.engine.inside_no_sync_ctxt = self.optimizer._coalesce_grad_reduction = False
        self.engine.set_gradient_accumulation_boundary(True)
        if self._zero == 3:
            self.engine._flush_coalesced_reduction_zero3(self.optimizer)
        else:
            self.engine._flush_coalesced_reduction_zero12(self.optimizer)

    @contextlib.contextmanager
    def evaluate(self) -> Iterator[None]:
        """Forwards only, in evaluation mode."""
        self.engine.eval()
        with torch.no_grad(), self._gathered():
            yield
        if self._holds:
            self.optimizer._partition_all_parameters()
        self.engine.train()

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        """With `parallel.gather=step`, has all units of the stage gathered in the order of their use: all are asked for
        at once, and each is waited for when the first forward reaches it. The optimizer's step releases them."""
        if self._holds:
            asked: set[int] = set()
            for _, unit in self._units():
                # A tied head asks for the tensor that the embedding has asked for.
                parameters: list[Any] = [p for p in unit.parameters() if id(p) not in asked]
                asked.update(map(id, parameters))
                if parameters:
                    self._in_flight[unit] = parameters[0].all_gather_coalesced(parameters)
        yield
        for unit in list(self._in_flight):
            self._arrive(unit)

    def _arrive(self, unit: nn.Module) -> None:
        if (handle := self._in_flight.pop(unit, None)) is not None:
            handle.wait()

    def step(self, lr: float) -> float:
        """Clips, updates, releases held parameters.

        Returns:
            The global gradient norm before clipping, over all stages; not finite where the step was skipped.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.set_gradient_accumulation_boundary(True)
        if self._zero == 0:
            counted = [p.grad for p in self._parameters if p.grad is not None and p.model_parallel]
            norm = global_norm(counted, self._mesh.pipe_group)
            if torch.isfinite(norm):
                clip(self._parameters, norm, self._clip)
                self.engine.step()
            self.engine.zero_grad()
            return norm.item()
        # The order of the modules never changes: one step has shown it, and comparing costs a broadcast a forward.
        coordinator.assert_ints_same_as_other_ranks = lambda _ints: None
        skipped = self.engine.skipped_steps
        self.engine.step()
        reported = float(self.engine.get_global_grad_norm() or 0.0)
        # DeepSpeed writes a norm that is not finite as -1.
        return float("nan") if self.engine.skipped_steps > skipped or reported < 0 else reported

    def dtypes(self) -> dict[str, torch.dtype]:
        """Where each dtype is, read back from live tensors after a step."""
        optimizer = self.optimizer
        if self._zero == 3:
            masters = optimizer.fp32_partitioned_groups_flat
        elif self._zero > 0:
            masters = optimizer.single_partition_of_fp32_groups
        else:
            masters = [p for group in optimizer.param_groups for p in group["params"]]
        state = optimizer.state[masters[0]]
        reduced = getattr(optimizer, "communication_data_type", self._gradient_dtype)
        return {
            "parameters": next(iter(self._parameters)).dtype,
            "masters": masters[0].dtype,
            "gradient sums": self._gradient_dtype,
            "gradient reduction": reduced,
            **{name: value.dtype for name, value in state.items() if name != "step"},
        }

    def check_tied(self) -> None:
        """Compares the two copies of a tied embedding, this rank's part of it. Collective over its two holders.

        Raises:
            RuntimeError: on one holder at least, where they differ.
        """
        if self._tied is None:
            return
        mine = self._tied.ds_tensor if self._zero == 3 else self._tied.detach()
        larger = mine.clone()
        dist.all_reduce(larger, dist.ReduceOp.MAX, group=self._mesh.tied_group)
        if not torch.equal(larger, mine):
            raise RuntimeError("the first and the last stage no longer hold the same tied embedding")

    def _tied_gradients(self) -> list[torch.Tensor]:
        """Reduced gradients of the copy of a tied embedding that this rank holds, this rank's part of them. The two
        copies are alone in their parameter groups, so the parts of the two holders are the same elements."""
        if self._tied is None:
            return []
        if self._zero == 0:
            return [self._tied.grad]
        groups = self.optimizer.fp16_groups if self._zero == 3 else self.optimizer.bit16_groups
        return [
            gradient
            for index, group in enumerate(groups)
            if any(parameter is self._tied for parameter in group)
            for gradient in self.optimizer.averaged_gradients[index]
        ]

    def _reduce_norm_once(self) -> None:
        """ZeRO-3 reduces the norm once per optimizer sub-group over the pipe group; stages with unequal numbers of
        sub-groups would hang. Summed locally first, then reduced once. DeepSpeed takes a negative norm for not
        finite."""
        optimizer, mesh = self.optimizer, self._mesh

        def norm_groups() -> list[torch.Tensor]:
            counted = [
                gradient
                for index, group in enumerate(optimizer.fp16_groups)
                for parameter, gradient in zip(group, optimizer.averaged_gradients[index], strict=True)
                if parameter.model_parallel
            ]
            norm = global_norm(counted, mesh.data_group, mesh.pipe_group)
            return [torch.where(norm.isfinite(), norm, torch.full_like(norm, -1.0))]

        optimizer._get_norm_groups = norm_groups

    def _live_gradient_dtype(self) -> torch.dtype:
        live = next((p.grad for p in self._parameters if p.grad is not None), None)
        if live is not None:
            return live.dtype
        if self._zero == 3:
            return self.optimizer.grad_partitions_flat_buffer.dtype
        return self.optimizer.averaged_gradients[0][0].dtype


class _Surrogate(torch.autograd.Function):
    """A scalar whose gradient with respect to `output` is `gradient`: DeepSpeed's backward takes only scalars."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return torch.zeros((), dtype=torch.float32, device=output.device)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0], None


def _scope_trace_check(mesh: Mesh) -> None:
    """ZeRO-3 compares its module order with a broadcast over the WORLD in the middle of a forward; stages hold
    different modules and run at different times, so that deadlocks. Compared over the data group instead, where the
    order must agree."""

    def same_on_data_group(ints: list[int]) -> None:
        # The ids count up over the life of a process: only their differences agree between processes.
        order = [i - ints[0] for i in ints]
        reference = [order if mesh.replica == 0 else None]
        dist.broadcast_object_list(reference, src=mesh.data_ranks[0], group=mesh.data_group)
        if reference[0] != order:
            raise RuntimeError(f"ZeRO-3 module order of rank {mesh.rank} differs from the first replica of its stage")

    coordinator.assert_ints_same_as_other_ranks = same_on_data_group
