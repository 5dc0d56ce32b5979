"""Where everything goes: ranks to stages and replicas, layers to stages, sequences to microbatches.

Pure arithmetic made once, before any process starts. Everything downstream reads the frozen `Plan`.
"""

import dataclasses
from dataclasses import dataclass

from stack.config.schema import Config, Parallel
from stack.errors import LayoutError
from stack.plan.hosts import ranks_of_hosts
from stack.plan.policies import SCHEDULES, check_policies
from stack.plan.shape import ModelShape, divisors, model_shape


@dataclass(frozen=True)
class Plan:
    """The layout of a run. The pipe is the outermost axis of the rank grid: a data group is contiguous, inside a host
    where it can be, and only hidden states cross hosts."""

    world_size: int
    nodes: int
    pipeline: int
    """Ranks along the pipe."""
    stages: int
    """Parts that the decoder layers are cut into; a rank of the pipe holds stages / pipeline of them."""
    replicas: int
    zero: int
    schedule: str
    shape: ModelShape
    seq_len: int
    global_size: int
    micro_size: int
    microbatches: int
    first_layers: tuple[int, ...]
    reasons: dict[str, str]

    @property
    def summary(self) -> str:
        """The layout in a few words."""
        return f"PP{self.pipeline} x DP{self.replicas}, ZeRO-{self.zero}, {self.schedule}"

    def pipe_rank_of(self, rank: int) -> int:
        return rank // self.replicas

    def replica_of(self, rank: int) -> int:
        return rank % self.replicas

    def rank_of(self, pipe_rank: int, replica: int) -> int:
        return pipe_rank * self.replicas + replica

    def stages_of(self, pipe_rank: int) -> tuple[int, ...]:
        """Stages that a rank of the pipe holds, in the order of the forward: dealt round, or folded into a V."""
        rounds = range(0, self.stages, self.pipeline)
        if SCHEDULES[self.schedule].folded:
            return tuple(
                start + (self.pipeline - 1 - pipe_rank if turn % 2 else pipe_rank) for turn, start in enumerate(rounds)
            )
        return tuple(start + pipe_rank for start in rounds)

    def holder_of(self, stage: int) -> int:
        """The rank of the pipe that holds a stage."""
        return next(pipe_rank for pipe_rank in range(self.pipeline) if stage in self.stages_of(pipe_rank))

    @property
    def tied_apart(self) -> bool:
        """Whether the token embedding and the head that is tied to it are on different ranks of the pipe."""
        return self.shape.tied and self.holder_of(0) != self.holder_of(self.stages - 1)

    def layers_of(self, stage: int) -> range:
        """Decoder layers of a stage."""
        ends = (*self.first_layers[1:], self.shape.layers)
        return range(self.first_layers[stage], ends[stage])

    def stage_params(self, stage: int) -> int:
        """Parameters a stage holds (before ZeRO shards them over its data group)."""
        first = self.shape.embedding_params if stage == 0 else 0
        last = self.shape.norm_params + self.shape.head_params if stage == self.stages - 1 else 0
        if stage == self.stages - 1 and self.shape.tied and not self.tied_apart:
            last -= self.shape.head_params
        return len(self.layers_of(stage)) * self.shape.layer_params + first + last

    def rank_params(self, pipe_rank: int) -> int:
        """Parameters of all stages of a rank of the pipe."""
        return sum(map(self.stage_params, self.stages_of(pipe_rank)))

    def stage_flops(self, stage: int) -> float:
        """Forward FLOPs of a stage per token."""
        head = self.shape.head_flops if stage == self.stages - 1 else 0
        return len(self.layers_of(stage)) * self.shape.layer_flops(self.seq_len) + head

    def to_dict(self) -> dict:
        """Plain values for plan.json, with the per-stage table."""
        table = [
            {
                "stage": stage,
                "layers": [self.layers_of(stage).start, self.layers_of(stage).stop],
                "ranks": [self.rank_of(self.holder_of(stage), replica) for replica in range(self.replicas)],
                "params": self.stage_params(stage),
                "forward_flops_per_token": self.stage_flops(stage),
            }
            for stage in range(self.stages)
        ]
        return {**dataclasses.asdict(self), "total_params": self.shape.total_params, "stage_table": table}


def make_plan(cfg: Config, world_size: int | None = None, nodes: int = 1) -> Plan:
    """Lays the run out over `world_size` ranks on `nodes` hosts (default: those that `cfg.launch` asks for).

    Raises:
        LayoutError: ranks, stages, layers and batch do not fit together.
    """
    reasons: dict[str, str] = {}
    if world_size is None:
        nodes, per_node, why = ranks_of_hosts(cfg)
        world_size = nodes * per_node
        reasons["ranks"] = f"{nodes} {'host' if nodes == 1 else 'hosts'} x {per_node} ranks ({why})"
    else:
        reasons["ranks"] = "as launched"
    replicas = _replicas(cfg.parallel, world_size)
    reasons["replicas"] = f"{world_size} ranks / {cfg.parallel.pipeline} stages"
    shape = model_shape(cfg.model)
    _check_model(cfg, shape)
    check_policies(cfg, replicas, tied=shape.tied)
    first_layers, reasons["split"] = _split(cfg.parallel, shape, cfg.data.seq_len)
    microbatches = _microbatches(cfg, replicas)
    reasons["microbatches"] = (
        f"batch.global_size {cfg.batch.global_size} / (micro_size {cfg.batch.micro_size} x {replicas} replicas)"
    )
    return Plan(
        world_size=world_size,
        nodes=nodes,
        pipeline=cfg.parallel.pipeline,
        stages=len(first_layers),
        replicas=replicas,
        zero=cfg.parallel.zero,
        schedule=cfg.parallel.schedule,
        shape=shape,
        seq_len=cfg.data.seq_len,
        global_size=cfg.batch.global_size,
        micro_size=cfg.batch.micro_size,
        microbatches=microbatches,
        first_layers=first_layers,
        reasons=reasons,
    )


def _replicas(parallel: Parallel, world_size: int) -> int:
    if world_size % parallel.pipeline:
        legal = [str(d) for d in divisors(world_size)]
        raise LayoutError(f"parallel.pipeline={parallel.pipeline} does not divide {world_size} ranks; use {_or(legal)}")
    replicas = world_size // parallel.pipeline
    if parallel.data not in ("auto", replicas):
        raise LayoutError(
            f"parallel.data={parallel.data} x parallel.pipeline={parallel.pipeline} is not {world_size} ranks; "
            f"use parallel.data={replicas} (or auto), or start {parallel.data * parallel.pipeline} ranks"
        )
    return replicas


def _check_model(cfg: Config, shape: ModelShape) -> None:
    if cfg.data.tokenizer == "bpe" and cfg.data.vocab_size > shape.vocab:
        raise LayoutError(
            f"data.vocab_size={cfg.data.vocab_size} is larger than model.config.vocab_size={shape.vocab}; "
            f"use model.config.vocab_size={cfg.data.vocab_size}"
        )


def _split(parallel: Parallel, shape: ModelShape, seq_len: int) -> tuple[tuple[int, ...], str]:
    stages = parallel.pipeline * parallel.virtual_stages
    if stages > shape.layers:
        what, most = f"parallel.pipeline={parallel.pipeline}", f"{shape.layers}"
        if parallel.virtual_stages > 1 and parallel.pipeline <= shape.layers:
            what += f" x parallel.virtual_stages={parallel.virtual_stages}"
            most = f"virtual_stages={shape.layers // parallel.pipeline}"
        raise LayoutError(
            f"{what} is more than the model's {shape.layers} decoder layers and every stage needs one; "
            f"use at most {most}"
        )
    if parallel.split == "auto":
        return balanced_split(shape, stages, seq_len), "smallest largest stage by FLOPs, the head counted"
    split = tuple(parallel.split)
    if len(split) != stages or split[-1] >= shape.layers:
        even = [stage * shape.layers // stages for stage in range(stages)]
        raise LayoutError(
            f"parallel.split={list(split)} must name the first of {shape.layers} layers for each of {stages} stages; "
            f"use for example {even}"
        )
    return split, "parallel.split"


def balanced_split(shape: ModelShape, stages: int, seq_len: int) -> tuple[int, ...]:
    """First layer of each stage so that the costliest stage is as cheap as can be.

    A stage's cost is its share of the FLOPs, the output projection on the last stage counted; a hundredth of its
    share of the parameters decides between splits of equal FLOPs. Every stage gets a layer. Exact (dynamic
    programming over contiguous partitions), O(stages x layers^2).
    """
    flops = shape.layers * shape.layer_flops(seq_len) + shape.head_flops
    params = max(shape.total_params, 1)
    layer = shape.layer_flops(seq_len) / flops + 0.01 * shape.layer_params / params
    first = 0.01 * shape.embedding_params / params
    last = shape.head_flops / flops + 0.01 * shape.head_params / params

    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(stages):
        extra = (first if stage == 0 else 0) + (last if stage == stages - 1 else 0)
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        ends = [shape.layers] if stage == stages - 1 else range(stage + 1, shape.layers - (stages - stage - 1) + 1)
        for end in ends:
            following[end] = min(
                (max(cost, (end - start) * layer + extra), (*starts, start))
                for start, (cost, starts) in best.items()
                if start < end
            )
        best = following
    return best[shape.layers][1]


def _microbatches(cfg: Config, replicas: int) -> int:
    """The batch triangle: global_size = micro_size x microbatches x replicas, in sequences."""
    size, micro, parallel = cfg.batch.global_size, cfg.batch.micro_size, cfg.parallel
    microbatches, rest = divmod(size, micro * replicas)
    if rest:
        raise LayoutError(
            f"batch.global_size={size} is not a multiple of batch.micro_size={micro} x {replicas} replicas; "
            f"nearest: {_nearest_batches(size, micro, replicas, parallel)}"
        )
    if why := _illegal_count(microbatches, parallel):
        raise LayoutError(
            f"batch.global_size={size} gives {microbatches} microbatches and parallel.schedule={parallel.schedule} "
            f"{why}; nearest: {_nearest_batches(size, micro, replicas, parallel)}"
        )
    return microbatches


def _illegal_count(microbatches: int, parallel: Parallel) -> str:
    """Why the schedule cannot run so many microbatches, or nothing."""
    ranks = parallel.pipeline
    if parallel.schedule == "1f1b" and microbatches < ranks:
        return f"needs one for each of {ranks} stages"
    if parallel.schedule.startswith("interleaved") and microbatches % max(1, microbatches // ranks):
        return f"runs them in equal rounds of {ranks} or more"
    return ""


def _nearest_batches(size: int, micro: int, replicas: int, parallel: Parallel) -> str:
    """The three legal (global_size, micro_size, microbatches) closest to what was asked for, in relative change."""
    legal = []
    for candidate in range(1, 2 * micro + 1):
        unit = candidate * replicas
        around = range(max(1, size // unit - parallel.pipeline), size // unit + 2 * parallel.pipeline + 1)
        possible = sorted((c for c in around if not _illegal_count(c, parallel)), key=lambda c: abs(c * unit - size))
        for count in possible[:2]:
            distance = abs(count * unit - size) / size + abs(candidate - micro) / micro
            legal.append((distance, count * unit, candidate, count))
    return "; ".join(
        f"global_size={total} micro_size={candidate} ({count} microbatches)"
        for _, total, candidate, count in sorted(legal)[:3]
    )


def _or(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"
