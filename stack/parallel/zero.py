"""One DeepSpeed engine per pipeline stage. The only file that touches DeepSpeed's private names.

DeepSpeed's own PipelineEngine refuses ZeRO-2 and 3. A plain DeepSpeedEngine over the stage's data group does not,
but it was written for one forward followed by one backward over the world. Each function here undoes one such
assumption; tests/dist/test_parity.py fails when one of them is left out.
"""

import contextlib
import importlib
import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from stack.config.deepspeed import deepspeed_zero_stage
from stack.config.schema import Config
from stack.models.build import Stage
from stack.parallel.mesh import Mesh, Mpu, local_device
from stack.parallel.replicated import MasterAdamW, clip, global_norm


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


class ZeroEngine:
    """A stage's DeepSpeedEngine, driven microbatch by microbatch in any order.

    One step: inside `accumulate()` any interleaving of `forward` and `backward`, then `step(lr)`.
    """

    def __init__(self, stage: Stage, *, cfg: Config, mesh: Mesh, config: dict[str, Any]):
        self._mesh, self._clip = mesh, cfg.optim.grad_clip
        self._zero, self._reduce_once = deepspeed_zero_stage(cfg), cfg.parallel.reduce == "step"
        self._holds = self._zero == 3 and cfg.parallel.gather == "step"
        self._stage = stage
        self._in_flight: dict[nn.Module, Any] = {}
        # Any: DeepSpeed hangs its state on the parameters.
        self._parameters: list[Any] = list(stage.parameters())
        self._gradient_dtype: torch.dtype | None = None
        _scope_trace_check(mesh)
        for parameter in self._parameters:
            # Without the mark DeepSpeed counts only the first stage's parameters in the global norm, silently.
            parameter.model_parallel = True
            # Sums of many microbatches lose bits in bf16: autograd adds them in fp32 whatever the parameter's dtype.
            parameter.grad_dtype = torch.float32
        if self._zero == 3:
            # One gather and one hook a decoder layer instead of one a projection.
            deepspeed.utils.set_z3_leaf_modules(stage, sorted({type(layer) for layer in stage.layers}, key=str))
        self.engine, *_ = deepspeed.initialize(
            model=stage, optimizer=_adamw(stage, cfg), mpu=Mpu(mesh), config=config, dist_init_required=False
        )
        if self._zero == 3:
            _reduce_norm_once(self.optimizer, mesh)
            if self._holds:
                # Parameters are gathered by `_gathered` instead of by a hook around each module in each microbatch.
                self.optimizer.parameter_offload._remove_module_hooks()
                stage.before_unit = self._arrive
        elif self._zero > 0:
            # ZeRO-2 would copy the fp32 sums through a buffer of the parameters' dtype before it reduces them.
            self.optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32

    @property
    def optimizer(self) -> Any:
        return self.engine.optimizer

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self.engine(*args, **kwargs)

    def backward(self, output: torch.Tensor, gradient: torch.Tensor | None, *, last: bool) -> None:
        """Runs the backward of one microbatch.

        Args:
            output: the loss (0-dimensional) on the last stage, else the hidden states that were sent on.
            gradient: None on the last stage, else the gradient of `output`.
            last: whether this is the step's last backward on this rank.
        """
        loss = output if gradient is None else _Surrogate.apply(output, gradient)
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if isinstance(self.optimizer, ZeROOptimizer):
            # Cleared only in forward otherwise: the second of two backwards in a row would overwrite, not add.
            self.optimizer.clear_backward_seen_flag()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Everything of a step but the update. Gradients are reduced on leaving, or in each backward."""
        # ZeRO-0 reduces in its last backward, at the accumulation boundary.
        once = self._zero > 0 and self._reduce_once
        with self._gathered(), self._reduced_once() if once else contextlib.nullcontext():
            yield
            if self._gradient_dtype is None:
                self._gradient_dtype = self._live_gradient_dtype()

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
            for _, unit in self._stage.units():
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
            norm = global_norm([p.grad for p in self._parameters if p.grad is not None], self._mesh.pipe_group)
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
            "exp_avg": state["exp_avg"].dtype,
            "exp_avg_sq": state["exp_avg_sq"].dtype,
        }

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


def _adamw(stage: Stage, cfg: Config) -> torch.optim.Optimizer:
    """AdamW without a compiled op; matrices are decayed, norms and biases are not."""
    decayed: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for parameter in stage.parameters():
        # A ZeRO-3 parameter is an empty placeholder that remembers its shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if len(shape) >= 2 else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": cfg.optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    kind = MasterAdamW if deepspeed_zero_stage(cfg) == 0 else torch.optim.AdamW
    first, second = cfg.optim.betas
    return kind(groups, lr=cfg.optim.lr, betas=(first, second), eps=cfg.optim.eps, fused=True)


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


def _reduce_norm_once(optimizer: Any, mesh: Mesh) -> None:
    """ZeRO-3 reduces the norm once per optimizer sub-group over the pipe group; stages with unequal numbers of
    sub-groups would hang. Summed locally first, then reduced once. DeepSpeed takes a negative norm for not finite."""

    def norm_groups() -> list[torch.Tensor]:
        gradients = [gradient for group in optimizer.averaged_gradients.values() for gradient in group]
        norm = global_norm(gradients, mesh.data_group, mesh.pipe_group)
        return [torch.where(norm.isfinite(), norm, torch.full_like(norm, -1.0))]

    optimizer._get_norm_groups = norm_groups
