"""The engine of one rank: runs a whole optimizer step, or a whole held-out batch, in one call."""

import hashlib
from collections.abc import Callable

import torch
import torch.distributed as dist

from stack.config.schema import Config
from stack.data.batches import Batch
from stack.models.build import build_stages, compute_dtype
from stack.models.documents import uses_bounds
from stack.parallel import zero
from stack.parallel.activation import apply_checkpointing
from stack.parallel.clock import StepClock
from stack.parallel.compiled import compile_layers
from stack.parallel.loading import DeviceBatch, Loader
from stack.parallel.mesh import Mesh
from stack.parallel.rank_engine import RankEngine
from stack.parallel.replicated import ReplicatedEngine
from stack.parallel.schedule import make_schedule
from stack.parallel.step import RunningStep, StepResult
from stack.plan.layout import Plan

#: Steps between two comparisons of the copies of a tied embedding; each comparison sends a shard of the embedding.
TIED_CHECK_EVERY = 100


class Engine:
    """This rank's stages of the run. Every method is collective over all ranks."""

    def __init__(self, cfg: Config, plan: Plan, mesh: Mesh, *, empty: bool = False):
        """
        Args:
            cfg: the config.
            plan: the layout.
            mesh: this rank's process groups.
            empty: leave the parameters zero, because a checkpoint will fill them.

        Raises:
            ConfigError, LayoutError, CheckpointError: as `build_stages`.
        """
        self._plan, self._mesh = plan, mesh
        self.ds_config = zero.config_of(cfg, plan) if plan.zero > 0 else {}
        # The order matters: ZeRO-3 shards each unit as soon as it exists, and checkpointing changes the forwards of
        # layers before the engine sets its hooks.
        place = (lambda unit: zero.shard(unit, mesh=mesh, config=self.ds_config)) if plan.zero == 3 else None
        self.stages = build_stages(cfg, plan, mesh.pipe_rank, device=mesh.device, place=place, empty=empty)
        for stage in self.stages:
            apply_checkpointing(stage, cfg.activation)
            if cfg.precision.compile:
                compile_layers(stage)
        self._seed = f"{cfg.run.seed}:{mesh.rank}"
        self.seed(0)
        self.rank_engine: RankEngine = (
            zero.ZeroEngine(self.stages, cfg=cfg, mesh=mesh, config=self.ds_config)
            if plan.zero > 0
            else ReplicatedEngine(self.stages, cfg=cfg, mesh=mesh)
        )
        self.dtypes: dict[str, str] = {}
        """Kind of tensor, such as "masters" -> dtype, read from live tensors in the first step; empty before."""
        self._clock = StepClock(mesh.device)
        self._loss_scale = 1.0
        self._dtype = compute_dtype(cfg)
        self._pipeline = make_schedule(
            self.rank_engine,
            plan=plan,
            mesh=mesh,
            dtype=self._dtype,
            loss_scale=lambda: self._loss_scale,
            clock=lambda: self._clock,
        )
        self._routers = [stage.router for stage in self.stages if stage.router is not None]
        for router in self._routers:
            router.scale = lambda: self._loss_scale * self.rank_engine.loss_scale
        reads_bounds = uses_bounds(self.stages[0].model.config)
        self._loader = Loader(mesh.device, reads_ids=self.stages[0].first, reads_bounds=reads_bounds)
        self._steps = 0

    @property
    def runs_ahead(self) -> bool:
        """Whether the device works on a step while the host prepares the next one: true on a GPU."""
        return self._mesh.device.type == "cuda"

    def seed(self, step: int) -> None:
        """Seeds torch's generator with a function of (run.seed, rank, step). So a resumed run has the same dropout as a
        run that was never stopped, and no state of a generator has to be saved."""
        digest = hashlib.blake2b(f"{self._seed}:{step}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest))

    def load(self, batch: Batch) -> DeviceBatch:
        """Starts to copy a batch to the device. May be called from any thread while a step runs."""
        return self._loader.load(batch)

    def start_batch(self, batch: DeviceBatch, *, lr: float) -> RunningStep:
        """Starts one optimizer step on this replica's part of the global batch, at learning rate `lr`.

        The summed token losses are divided once, on the last stage, by the number of targets in the global batch, so
        that uneven padding of microbatches and replicas does not change the result.

        Raises:
            RuntimeError: the copies of a tied embedding differ, or a live tensor has an unexpected dtype.
        """
        self._clock = StepClock(self._mesh.device)
        # ZeRO averages gradients over the data group. The gradient of the mean over the global batch is a sum over
        # replicas, so the loss is multiplied by their number.
        self._loss_scale = self._plan.replicas / max(batch.global_target_tokens, 1)
        losses: list[torch.Tensor] = []
        scale = self.rank_engine.loss_scale if self._dtype == torch.float16 else None
        with self.rank_engine.accumulate(), self._clock.pipeline():
            self._run(self._pipeline.train, batch, losses)
        grad_norm = self.rank_engine.step(lr)
        if self._steps % TIED_CHECK_EVERY == 0:
            self.rank_engine.check_tied()
        self._steps += 1
        if not self.dtypes and grad_norm.isfinite():
            found = self.rank_engine.dtypes() | self.stages[0].table_dtypes()
            _check_dtypes(found, self._dtype)
            self.dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in found.items()}
        return RunningStep(
            self._clock,
            mesh=self._mesh,
            losses=losses,
            auxiliary=[loss for router in self._routers for loss in router.take()] if self._routers else None,
            grad_norm=grad_norm,
            tokens=batch.global_target_tokens,
            lr=lr,
            loss_scale=scale,
        )

    def train_batch(self, batch: Batch, *, lr: float) -> StepResult:
        """Runs `start_batch` and waits for its result."""
        return self.start_batch(self.load(batch), lr=lr).result()

    def eval_batch(self, batch: Batch) -> float:
        """Sum of the token losses of a held-out batch over all replicas, in nats; the same on every rank."""
        losses: list[torch.Tensor] = []
        self._loss_scale = 1.0
        with self.rank_engine.evaluate():
            self._run(self._pipeline.evaluate, self.load(batch), losses)
        total = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        if losses:
            total += torch.stack(losses).double().sum()
        dist.all_reduce(total)
        return total.item()

    def _run(self, pipeline: Callable[..., None], batch: DeviceBatch, losses: list[torch.Tensor]) -> None:
        """Runs a schedule on a batch. Only the first stage gets token ids; every stage gets labels, positions and the
        bounds of documents. Appends this rank's token losses to `losses`."""
        batch.arrive()
        args = [batch.input_ids] if self.stages[0].first else []
        target = {"target": batch.labels, "losses": losses} if self.stages[-1].last else {}
        bounds = {} if batch.bounds is None else {"bounds": batch.bounds}
        for stage in self.stages:
            stage.documents = batch.documents
        pipeline(*args, positions=batch.positions, labels=batch.labels, **bounds, **target)


def _check_dtypes(found: dict[str, torch.dtype], compute: torch.dtype) -> None:
    """Raises `RuntimeError` where a live tensor has an unexpected dtype: parameters must have the compute dtype, all
    other tensors fp32."""
    wrong = {
        name: dtype for name, dtype in found.items() if dtype != (compute if name == "parameters" else torch.float32)
    }
    if wrong:
        raise RuntimeError(f"unexpected dtypes: {wrong}")
