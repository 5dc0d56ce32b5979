"""One DeepSpeed engine for the stages of a rank. Only this file and zero_state.py use private names of DeepSpeed.

DeepSpeed's own PipelineEngine refuses ZeRO-2 and 3. A plain DeepSpeedEngine over the stage's data group does not, but
it assumes one forward followed by one backward over all ranks. docs/engine.md lists such assumptions, and
tests/numerics fails when one of the workarounds here is left out.
"""

import contextlib
import importlib
import logging
import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.utils import is_invalid_grad_norm
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.utils import groups
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from stack.config.deepspeed import deepspeed_zero_stage, ds_config
from stack.config.schema import Config
from stack.errors import ConfigError
from stack.models.build import Stage
from stack.parallel import meeting, selftest, zero_state
from stack.parallel.gathering import Gathers, arrive_with_forward, follow_microbatches
from stack.parallel.mesh import Mesh, Mpu, local_device
from stack.parallel.norm import global_norm
from stack.parallel.optimizer import make_optimizer, skip_unless_finite
from stack.parallel.parts import Part
from stack.parallel.rank_engine import RankEngine
from stack.plan.layout import Plan
from stack.plan.policies import MASTER

selftest.require(deepspeed.__version__, torch.__version__)


def init_distributed(*, timeout: timedelta) -> None:
    """Starts torch.distributed through DeepSpeed: NCCL with GPUs, gloo without. Collective."""
    # On a CPU DeepSpeed would compile a shared-memory all-reduce at its first start, which is not used here.
    # The module is imported by name because the attribute `deepspeed.comm.torch` is torch itself.
    _replace(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
    deepspeed_logger.setLevel(logging.WARNING)
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # DeepSpeed uses LOCAL_RANK as the number of the device. The two differ where each rank sees only one GPU
        # (Slurm's --gpus-per-task). `ranks.from_environment` has read the launcher's value before.
        os.environ["LOCAL_RANK"] = str(device.index)
    else:
        # torch computes in fp16 on every CPU, but DeepSpeed refuses fp16 on CPUs without instructions for it.
        _replace(type(get_accelerator()), "is_fp16_supported", lambda _self: True)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timeout,
        init_method=meeting.init_method(),
        verbose=False,
        auto_mpi_discovery=False,
    )


def close() -> None:
    """Waits for every rank and destroys the process groups. Collective."""
    dist.barrier()
    dist.destroy_process_group()


def config_of(cfg: Config, plan: Plan) -> dict[str, Any]:
    """The DeepSpeed config of a run, the same on every rank."""
    largest = max(map(plan.rank_params, range(plan.pipeline)))
    streams = local_device().type == "cuda"
    return ds_config(cfg, replicas=plan.replicas, rank_params=largest, streams=streams)


def shard(unit: nn.Module, *, mesh: Mesh, config: dict[str, Any]) -> None:
    """Shards the parameters of `unit` over the stage's data group, as ZeRO-3 keeps them. Collective over that group.

    `zero.Init` by default, or through transformers' HfDeepSpeedConfig, would shard over all ranks.
    """
    deepspeed.zero.Init(
        module=unit,
        data_parallel_group=mesh.data_group,
        # With hpZ the first unit makes this group, over consecutive global ranks. DeepSpeed refuses to make it twice.
        zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
        config_dict_or_path=config,
        mpu=Mpu(mesh),
        dtype=next(unit.parameters()).dtype,
    )


class ZeroEngine(RankEngine):
    """ZeRO 1 to 3: one DeepSpeedEngine over the stages of a rank."""

    def __init__(self, stages: list[Stage], *, cfg: Config, mesh: Mesh, config: dict[str, Any]):
        super().__init__(stages, cfg=cfg, mesh=mesh)
        self._zero, self._reduce_once = deepspeed_zero_stage(cfg), cfg.parallel.reduce == "step"
        self._holds = self._zero == 3 and cfg.parallel.gather == "step"
        self._gathers: Gathers | None = None
        self._fused, self._offloads = cfg.optim.fused, cfg.parallel.offload.optimizer != "none"
        # With several stages, the last backward of one stage is not the last one to add to a weight that stages share.
        self._reduces_early = self._zero == 3 and cfg.parallel.overlap and self._reduce_once and len(stages) == 1
        self._gradient_dtype: torch.dtype | None = None
        if cfg.parallel.offload.optimizer == "nvme":
            _require_files(Path(str(cfg.parallel.offload.folder)))
        optimizer = make_optimizer(self.parameters, cfg, tied=self.tied, shape_of=_whole_shape)
        self._engine, *_ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, mpu=Mpu(mesh), config=config, dist_init_required=False
        )
        self._optimizer: Any = self._engine.optimizer
        self._reduce_norm_once()
        # DeepSpeed would double the loss scale before it divides gradients by the scale. `step` updates it afterwards.
        _replace(self._optimizer, "_update_scale", lambda _overflow: None)
        # DeepSpeed would make the host wait to know whether to update; a fused kernel decides it on the device.
        waits = cfg.precision.dtype == "fp16" or not self._fused
        reads_norm = is_invalid_grad_norm if waits else lambda _norm: False
        for module in (stage3, stage_1_and_2):
            _replace(module, "is_invalid_grad_norm", reads_norm)
        if self._zero < 3:
            # ZeRO-2 would copy the fp32 sums into a buffer of the parameters' dtype before it reduces them.
            _replace(self._optimizer, "_gradient_reduction_buffer_dtype", lambda: torch.float32)
            if self._optimizer.cpu_offload and not self._reduce_once:
                self._sum_offloaded_in_fp32()
        else:
            self._gathers = self._gather_units(cfg)

    def _gather_units(self, cfg: Config) -> Gathers:
        # DeepSpeed's hooks around each module are removed; here one gather serves a whole unit.
        self._optimizer.parameter_offload._remove_module_hooks()
        quantize = cfg.parallel.quantized_weights
        units = [[unit for _, unit in stage.units()] for stage in self.stages]
        gathers = Gathers(
            units,
            ask=lambda parameters: parameters[0].all_gather_coalesced(parameters, quantize=quantize),
            release=lambda parameters: parameters[0].partition(parameters),
        )
        if self._holds:
            arrive_with_forward(gathers, units)
        else:
            follow_microbatches(gathers, units, ahead=cfg.parallel.overlap)
        return gathers

    @property
    def loss_scale(self) -> float:
        return float(self._optimizer.loss_scaler.loss_scale)

    def forward(self, index: int, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        if self.splits:
            # DeepSpeed's forward would expect a whole backward to follow.
            return super().forward(index, *args, **kwargs)
        return self._engine(index, *args, **kwargs)

    def backward(self, output: torch.Tensor, gradient: torch.Tensor | None, *, last: bool) -> None:
        if self.splits:
            super().backward(output, gradient, last=last)
            return
        # The loss is scaled only on the last stage: the backward of a surrogate ignores the factor of its output.
        loss = output if gradient is None else _Surrogate.apply(output, gradient)
        self._engine.set_gradient_accumulation_boundary(last)
        if last and self._reduces_early:
            # Each gradient is complete once this backward has added to it, and is reduced while the backward goes on.
            self._coalesce(False)
        self._engine.backward(loss, scale_wrt_gas=False)
        # DeepSpeed clears the flag only in forward: the second of two backwards in a row would overwrite gradients.
        self._optimizer.clear_backward_seen_flag()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        with self._gathered(), self._reduced_once() if self._reduce_once else contextlib.nullcontext():
            yield
            if self._gradient_dtype is None:
                self._gradient_dtype = self._live_gradient_dtype()
        if self._offloads and self.mesh.device.type == "cuda":
            # Copies of gradients to page-locked memory do not make the host wait, and the host reads them next.
            torch.cuda.synchronize(self.mesh.device)
        if self.tied is not None:
            # Each copy is alone in its parameter group, so the two ranks hold the same part of it.
            self.sum_tied([gradient for parameter, gradient in self._reduced() if parameter is self.tied])

    @contextlib.contextmanager
    def _reduced_once(self) -> Iterator[None]:
        """A context that postpones reductions to its end, like DeepSpeed's `coalesce_grad_reduction`.

        DeepSpeed's own reduces after an error too, so a rank that failed would wait for the others in a collective
        instead of reporting the error. Here an error only ends the postponing.
        """
        self._coalesce(True)
        try:
            yield
        finally:
            self._coalesce(False)
        self._engine.set_gradient_accumulation_boundary(True)
        if self._zero == 3:
            self._engine._flush_coalesced_reduction_zero3(self._optimizer)
        else:
            self._engine._flush_coalesced_reduction_zero12(self._optimizer)

    def _coalesce(self, on: bool) -> None:
        _replace(self._engine, "inside_no_sync_ctxt", on)
        _replace(self._optimizer, "_coalesce_grad_reduction", on)

    @contextlib.contextmanager
    def evaluate(self) -> Iterator[None]:
        with super().evaluate(), self._gathered():
            yield
        if self._gathers is not None:
            self._gathers.let_all_go()

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        """With `parallel.gather=step`, starts the gathers of all units in the order of their use. The first forward
        that reaches a unit waits for the unit."""
        if self._gathers is not None and self._holds:
            self._gathers.ask_all()
        yield
        if self._gathers is not None:
            self._gathers.arrive_all()

    def step(self, lr: float) -> torch.Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.set_gradient_accumulation_boundary(True)
        if self._gathers is not None:
            self._gathers.let_all_go()
        self._engine.step()
        # The scale stays equal on all ranks: DeepSpeed reduces `overflow` over the data group and the pipe group.
        self._optimizer.loss_scaler.update_scale(self._optimizer.overflow)
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self.mesh.device)

    def dtypes(self) -> dict[str, torch.dtype]:
        optimizer = self._optimizer
        masters = (
            optimizer.fp32_partitioned_groups_flat if self._zero == 3 else optimizer.single_partition_of_fp32_groups
        )
        assert self._gradient_dtype is not None
        return {
            "parameters": self.parameters[0].dtype,
            "masters": masters[0].dtype,
            "gradient sums": self._gradient_dtype,
            "gradient reduction": optimizer.communication_data_type,
            **{name: value.dtype for name, value in optimizer.state[masters[0]].items() if name != "step"},
        }

    @property
    def masters(self) -> list[torch.Tensor]:
        return zero_state.masters(self._optimizer, self._zero)

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer.optimizer

    @property
    def groups(self) -> int:
        return len(self.masters)

    @contextlib.contextmanager
    def parts(self, group: int, *, load: bool) -> Iterator[list[Part]]:
        with zero_state.in_memory(self._optimizer, group, self._zero), torch.no_grad():
            state = self._state(self.masters[group])
            flat = {name: self.masters[group].detach() if name == MASTER else state[name] for name in self.state_names}
            places = zero_state.places(self._optimizer, group, self._zero, replica=self.mesh.replica)
            yield [
                Part(
                    self.names[id(place.parameter)],
                    tuple(_whole_shape(place.parameter)),
                    place.start,
                    {name: tensor.narrow(0, place.offset, place.length) for name, tensor in flat.items()},
                )
                for place in places
                if load or place.parameter.model_parallel
            ]
            if load:
                zero_state.take_over(self._optimizer, group, self._zero, replica=self.mesh.replica)

    def loaded(self) -> None:
        zero_state.bring_to_users(self._optimizer, self._zero)

    @property
    def scaling(self) -> tuple[float, int] | None:
        scaler = self._optimizer.loss_scaler
        return (self.loss_scale, scaler.cur_iter - scaler.last_overflow_iter - 1) if scaler.dynamic else None

    @scaling.setter
    def scaling(self, value: tuple[float, int] | None) -> None:
        scaler = self._optimizer.loss_scaler
        if scaler.dynamic and value is not None:
            scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = value[0], value[1], -1

    def reduced_gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        return deepspeed.utils.safe_get_full_grad(parameter)

    def master(self, parameter: nn.Parameter) -> torch.Tensor:
        return deepspeed.utils.safe_get_full_fp32_param(parameter)

    def own_part(self, parameter: Any) -> torch.Tensor:
        return parameter.ds_tensor if self._zero == 3 else parameter.detach()

    def _reduced(self) -> list[tuple[Any, torch.Tensor]]:
        return zero_state.reduced(self._optimizer, self._zero)

    def _reduce_norm_once(self) -> None:
        """Replaces DeepSpeed's norm by a sum on this rank and one reduction. DeepSpeed reduces once for each optimizer
        group, over the pipe group too, so ranks with unequal numbers of groups would hang. DeepSpeed divides the result
        by the loss scale."""

        def norm(*_: Any) -> torch.Tensor:
            counted = [gradient for parameter, gradient in self._reduced() if parameter.model_parallel]
            mesh = self.mesh
            found = global_norm(counted, mesh.data_group, mesh.pipe_group, device=mesh.device)
            found = found.to(self._optimizer.device)
            if self._fused:
                skip_unless_finite(self._optimizer.optimizer, found)
            return found

        if self._zero == 3:
            _replace(self._optimizer, "_get_norm_groups", lambda: [norm()])
        else:
            _replace(self._optimizer, "scaled_global_norm", norm)

    def _sum_offloaded_in_fp32(self) -> None:
        """Makes ZeRO-2 sum offloaded gradients of microbatches in fp32 instead of the parameters' dtype."""
        optimizer = self._optimizer
        buffer = optimizer.temp_grad_buffer_for_gpu_offload
        optimizer.temp_grad_buffer_for_gpu_offload = torch.zeros_like(buffer, dtype=torch.float32)
        for parameter in (parameter for group in optimizer.params_in_partition for parameter in group):
            optimizer.accumulated_grads_in_cpu[optimizer.get_param_id(parameter)] = torch.zeros(
                parameter.numel(), dtype=torch.float32, device=optimizer.device
            )

    def _live_gradient_dtype(self) -> torch.dtype:
        live = next((p.grad for p in self.parameters if p.grad is not None), None)
        if live is not None:
            return live.dtype
        if self._zero == 3:
            return self._optimizer.grad_partitions_flat_buffer.dtype
        if self._optimizer.cpu_offload:
            return next(iter(self._optimizer.accumulated_grads_in_cpu.values())).dtype
        return self._optimizer.averaged_gradients[0][0].dtype


def _require_files(folder: Path) -> None:
    """Checks that states can be offloaded to files. DeepSpeed compiles its operator at the first use, for minutes.

    Raises:
        ConfigError: the operator cannot be compiled on this host, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"parallel.offload.folder={folder} cannot be made on this host ({error.strerror}); use a folder on its disk"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"parallel.offload.folder={folder} cannot be written on this host; use another folder")
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing or not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "parallel.offload.optimizer=nvme: DeepSpeed's async_io op cannot be compiled on this host, which needs "
            f"{' and '.join(missing) or 'libaio (package libaio-dev)'}; install that, or use offload.optimizer=cpu"
        )


def _whole_shape(parameter: Any) -> torch.Size:
    """Shape of the whole parameter; a ZeRO-3 parameter is an empty tensor with the whole shape in `ds_shape`."""
    return getattr(parameter, "ds_shape", parameter.shape)


class _Surrogate(torch.autograd.Function):
    """A scalar whose gradient with respect to `output` is `gradient`, because DeepSpeed's backward takes a scalar."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return torch.zeros((), dtype=torch.float32, device=output.device)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0], None


def _replace(owner: Any, name: str, value: Any) -> None:
    """Sets a private attribute of DeepSpeed that must exist already; setting a new one would have no effect.

    Raises:
        AttributeError: this version of DeepSpeed has no such attribute.
    """
    if not hasattr(owner, name):
        where = getattr(owner, "__name__", type(owner).__name__)
        raise AttributeError(f"deepspeed {deepspeed.__version__} has no {where}.{name}")
    setattr(owner, name, value)
