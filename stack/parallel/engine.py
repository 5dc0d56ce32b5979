"""The engine of a run on one rank: a whole optimizer step, or a whole held-out batch, in one call."""

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from stack.config.schema import Config
from stack.data.batches import Batch
from stack.models.build import build_stages, compute_dtype
from stack.parallel import zero
from stack.parallel.activation import apply_checkpointing
from stack.parallel.compiled import compile_layers
from stack.parallel.mesh import Mesh
from stack.parallel.rank_engine import RankEngine
from stack.parallel.replicated import ReplicatedEngine
from stack.parallel.schedule import BusyClock, make_schedule
from stack.plan.layout import Plan

#: Steps between two comparisons of the copies of a tied embedding; each sends a shard of it.
TIED_CHECK_EVERY = 100


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave; the same on every rank.

    loss: mean token loss over the targets of the global batch, in nats, before the update.
    grad_norm: global L2 norm before clipping; not finite where the update was skipped.
    tokens: targets in the global batch.
    step_time_s: wall time of the slowest rank.
    bubble_fraction: share of the step in which a stage waited for its neighbours, mean over the ranks.
    memory_peak_bytes: largest peak of any rank since it started (device memory, or resident memory on the CPU).
    router_aux_loss: what a mixture of experts adds to the loss to balance its experts, coefficient included; None for
        other models.
    loss_scale: what fp16 multiplied the loss by in this step; None for other dtypes.
    """

    loss: float
    grad_norm: float
    tokens: int
    step_time_s: float
    bubble_fraction: float
    memory_peak_bytes: int
    router_aux_loss: float | None = None
    loss_scale: float | None = None

    @property
    def skipped(self) -> bool:
        """Whether an overflow in fp16 left the update out: not an error, the scale is halved."""
        return self.loss_scale is not None and not math.isfinite(self.grad_norm)


class Engine:
    """This rank's stages of the run. Every method is collective over all ranks."""

    def __init__(self, cfg: Config, plan: Plan, mesh: Mesh):
        self._plan, self._mesh = plan, mesh
        self.ds_config = zero.config_of(cfg, plan) if plan.zero > 0 else {}
        # Order matters: ZeRO-3 shards each unit as it is made; checkpointing changes forwards before hooks are set.
        place = (lambda unit: zero.shard(unit, mesh=mesh, config=self.ds_config)) if plan.zero == 3 else None
        self.stages = build_stages(cfg, plan, mesh.pipe_rank, device=mesh.device, place=place)
        for stage in self.stages:
            apply_checkpointing(stage, cfg.activation)
            if cfg.precision.compile:
                compile_layers(stage)
        # Dropout differs between ranks, whatever they drew before.
        torch.manual_seed(cfg.run.seed + mesh.rank)
        self.rank_engine: RankEngine = (
            zero.ZeroEngine(self.stages, cfg=cfg, mesh=mesh, config=self.ds_config)
            if plan.zero > 0
            else ReplicatedEngine(self.stages, cfg=cfg, mesh=mesh)
        )
        self.dtypes: dict[str, str] = {}
        """Where each dtype is, read back from live tensors in the first step."""
        self._clock = BusyClock(mesh.device)
        self._loss_scale = 1.0
        self._dtype = compute_dtype(cfg)
        self._schedule = make_schedule(
            self.rank_engine,
            plan=plan,
            mesh=mesh,
            dtype=self._dtype,
            loss_scale=lambda: self._loss_scale,
            clock=self._clock,
        )
        self._routers = [stage.router for stage in self.stages if stage.router is not None]
        for router in self._routers:
            router.scale = lambda: self._loss_scale * self.rank_engine.loss_scale
        self._steps = 0

    def train_batch(self, batch: Batch, *, lr: float) -> StepResult:
        """One optimizer step on this replica's part of the global batch.

        The summed token losses are divided once, on the last stage, by the targets of the global batch, so that
        uneven padding over microbatches and replicas changes nothing.
        """
        start = time.perf_counter()
        self._clock.reset()
        # ZeRO averages over the data group; a mean over the global batch is the sum of the replicas' shares.
        self._loss_scale = self._plan.replicas / max(batch.global_target_tokens, 1)
        losses: list[torch.Tensor] = []
        scale = self.rank_engine.loss_scale if self._dtype == torch.float16 else None
        with self.rank_engine.accumulate():
            pipeline_start = time.perf_counter()
            self._run(self._schedule.step, batch, losses)
            pipeline_s = self._elapsed(pipeline_start)
        grad_norm = self.rank_engine.step(lr)
        if self._steps % TIED_CHECK_EVERY == 0:
            self.rank_engine.check_tied()
        self._steps += 1
        if not self.dtypes and math.isfinite(grad_norm):
            found = self.rank_engine.dtypes() | self.stages[0].table_dtypes()
            _check_dtypes(found, self._dtype)
            self.dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in found.items()}
        idle = max(0.0, pipeline_s - self._clock.seconds())
        return self._gather(losses, batch, grad_norm=grad_norm, loss_scale=scale, idle_s=idle, start=start)

    def eval_batch(self, batch: Batch) -> float:
        """Summed token loss of a held-out batch over all replicas, in nats."""
        losses: list[torch.Tensor] = []
        self._loss_scale = 1.0
        with self.rank_engine.evaluate():
            self._run(self._schedule.eval, batch, losses)
        total = torch.tensor(_total(losses), dtype=torch.float64, device=self._mesh.device)
        dist.all_reduce(total)
        return total.item()

    def _run(self, schedule: Callable[..., object], batch: Batch, losses: list[torch.Tensor]) -> None:
        """Ids go to the first stage alone; every stage needs to know where documents begin and what is trained on."""
        args, target = [], {}
        labels = self._on_device(batch.labels)
        if self.stages[0].first:
            args = [self._on_device(batch.input_ids)]
        if self.stages[-1].last:
            target = {"target": labels, "losses": losses}
        schedule(*args, return_outputs=False, positions=self._on_device(batch.positions), labels=labels, **target)

    def _on_device(self, sequences: np.ndarray) -> torch.Tensor:
        """[microbatches, micro_size, seq_len] as [microbatches x micro_size, seq_len]."""
        return torch.from_numpy(sequences).flatten(0, 1).to(self._mesh.device)

    def _gather(
        self,
        losses: list[torch.Tensor],
        batch: Batch,
        *,
        grad_norm: float,
        loss_scale: float | None,
        idle_s: float,
        start: float,
    ) -> StepResult:
        """One small all-gather a step: every rank learns the loss, the idle time and the peak of all."""
        local = _total(losses)
        auxiliary = sum(_total(router.take()) for router in self._routers)
        took = self._elapsed(start)
        mine = torch.tensor([local, idle_s / took, took, self._memory_peak(), auxiliary], dtype=torch.float64)
        mine = mine.to(self._mesh.device)
        flat = torch.empty(dist.get_world_size() * mine.numel(), dtype=mine.dtype, device=mine.device)
        dist.all_gather_into_tensor(flat, mine)
        table = flat.view(-1, mine.numel()).cpu()
        return StepResult(
            # The scale of the backward carries the number of replicas, which ZeRO's average takes out again.
            loss=float(table[:, 0].sum()) / self._plan.replicas,
            grad_norm=grad_norm,
            tokens=batch.global_target_tokens,
            step_time_s=float(table[:, 2].max()),
            bubble_fraction=float(table[:, 1].mean()),
            memory_peak_bytes=int(table[:, 3].max()),
            router_aux_loss=float(table[:, 4].sum()) / batch.global_target_tokens if self._routers else None,
            loss_scale=loss_scale,
        )

    def _elapsed(self, start: float) -> float:
        if self._mesh.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return time.perf_counter() - start

    def _memory_peak(self) -> float:
        if self._mesh.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._mesh.device))
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _total(losses: list[torch.Tensor]) -> float:
    """Sum over the microbatches; 0 on stages that have no loss."""
    return float(torch.stack([loss.detach() for loss in losses]).double().sum()) if losses else 0.0


def _check_dtypes(found: dict[str, torch.dtype], compute: torch.dtype) -> None:
    """Raises RuntimeError where a live tensor has another dtype than the config promises."""
    wrong = {
        name: dtype for name, dtype in found.items() if dtype != (compute if name == "parameters" else torch.float32)
    }
    if wrong:
        raise RuntimeError(f"dtypes differ from what was promised: {wrong}")
