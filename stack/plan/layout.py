"""Where everything goes: ranks to stages and replicas, layers to stages, sequences to microbatches.

Pure arithmetic made once, before any process starts. Everything downstream reads the frozen `Plan`.
"""

import dataclasses
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from stack.config.schema import Config, Parallel
from stack.errors import LayoutError
from stack.plan.hosts import ranks_of_hosts
from stack.plan.policies import SCHEDULES, check_policies
from stack.plan.shape import ModelShape, divisors, model_shape

#: Legal values that an error lists.
_MOST_OFFERED = 12
#: How far around a microbatch size others are tried.
_NEAR = 32


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
        turn, place = divmod(stage, self.pipeline)
        return self.pipeline - 1 - place if turn % 2 and SCHEDULES[self.schedule].folded else place

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

    @cached_property
    def largest_rank_params(self) -> int:
        """Parameters of the rank of the pipe that has most."""
        return max(map(self.rank_params, range(self.pipeline)))

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
        ranks = f"{world_size} ranks ({why})"
    else:
        reasons["ranks"] = "as launched"
        ranks = f"{world_size} ranks"
    replicas = _replicas(cfg.parallel, world_size, ranks)
    reasons["replicas"] = f"{world_size} ranks / {cfg.parallel.pipeline} stages"
    shape = model_shape(cfg.model)
    _check_model(cfg, shape)
    check_policies(cfg, replicas, tied=shape.tied)
    first_layers, reasons["split"] = _split(cfg.parallel, shape, cfg.data.seq_len)
    microbatches = _microbatches(cfg, replicas, ranks)
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


def _replicas(parallel: Parallel, world_size: int, ranks: str) -> int:
    """
    Args:
        ranks: their number and where it comes from, for the error.
    """
    if world_size % parallel.pipeline:
        legal = sorted(sorted(divisors(world_size), key=lambda d: abs(d - parallel.pipeline))[:_MOST_OFFERED])
        offer = _or([str(d) for d in legal])
        raise LayoutError(f"parallel.pipeline={parallel.pipeline} does not divide {ranks}; use {offer}")
    replicas = world_size // parallel.pipeline
    if parallel.data not in ("auto", replicas):
        raise LayoutError(
            f"parallel.data={parallel.data} x parallel.pipeline={parallel.pipeline} is not {ranks}; "
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
            f"{what} is more than model.config.num_hidden_layers={shape.layers} and every stage needs a layer; "
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
    share of the parameters decides between splits of equal FLOPs. Every stage gets a layer. Of the splits that are as
    cheap, the one whose last stage is largest is taken, and the stages ahead of it are split in the same way.
    """
    flops = shape.layers * shape.layer_flops(seq_len) + shape.head_flops
    params = max(shape.total_params, 1)
    layer = shape.layer_flops(seq_len) / flops + 0.01 * shape.layer_params / params
    first = 0.01 * shape.embedding_params / params
    head = shape.head_flops / flops + 0.01 * shape.head_params / params

    def ahead(count: int, layers: int) -> float:
        """Cost of the costliest of the first `count` stages, which have `layers` layers: of the first one, which has
        the embedding, or of the others, which share the rest evenly."""
        if count == 1:
            return layers * layer + first
        return _balance(
            range(1, layers - count + 2),
            growing=lambda own: own * layer + first,
            falling=lambda own: math.ceil((layers - own) / (count - 1)) * layer,
        )[1]

    def start_of_last(count: int, layers: int, extra: float) -> int:
        """First layer of the last of `count` stages, which have `layers` layers."""
        return _balance(
            range(count - 1, layers),
            growing=lambda start: ahead(count - 1, start),
            falling=lambda start: (layers - start) * layer + extra,
        )[0]

    starts, end = [0], shape.layers
    for count in range(stages, 1, -1):
        end = start_of_last(count, end, head if count == stages else 0.0)
        starts.insert(1, end)
    return tuple(starts)


def _balance(numbers: range, growing: Callable[[int], float], falling: Callable[[int], float]) -> tuple[int, float]:
    """The number, the smallest of several, for which the larger of both functions is least; and that value."""
    meet = bisect_left(numbers, True, key=lambda number: growing(number) >= falling(number))
    near = numbers[max(meet - 1, 0) : meet + 1]
    return min(((number, max(growing(number), falling(number))) for number in near), key=lambda found: found[1])


def _microbatches(cfg: Config, replicas: int, ranks: str) -> int:
    """The batch triangle: global_size = micro_size x microbatches x replicas, in sequences."""
    size, micro, parallel = cfg.batch.global_size, cfg.batch.micro_size, cfg.parallel
    microbatches, rest = divmod(size, micro * replicas)
    if rest:
        raise LayoutError(
            f"batch.global_size={size} is not a multiple of batch.micro_size={micro} x {replicas} replicas, of "
            f"{ranks}; nearest: {_nearest_batches(size, micro, replicas, parallel)}"
        )
    if why := _illegal_count(microbatches, parallel):
        raise LayoutError(
            f"batch.global_size={size} gives {microbatches} microbatches on {ranks}, and "
            f"parallel.schedule={parallel.schedule} {why}; nearest: {_nearest_batches(size, micro, replicas, parallel)}"
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
    """Three legal (global_size, micro_size, microbatches) that are close to what was asked for, in relative change."""
    legal = set()
    for candidate in _micro_sizes(size, micro, replicas, parallel.pipeline):
        unit = candidate * replicas
        for count in _legal_counts(size // unit, parallel):
            distance = abs(count * unit - size) / size + abs(candidate - micro) / micro
            legal.add((distance, count * unit, candidate, count))
    return "; ".join(
        f"global_size={total} micro_size={candidate} ({count} microbatches)"
        for _, total, candidate, count in sorted(legal)[:3]
    )


def _micro_sizes(size: int, micro: int, replicas: int, pipeline: int) -> set[int]:
    """Microbatch sizes that may be legal and near: small ones, those around `micro`, and those that leave the global
    size about as it is with few microbatches."""
    few = {size // (replicas * count) for count in range(pipeline, pipeline + _NEAR)}
    found = {*range(1, _NEAR), *range(micro - _NEAR, micro + _NEAR), *few}
    return {candidate for candidate in found if 1 <= candidate <= 2 * micro}


def _legal_counts(wanted: int, parallel: Parallel) -> list[int]:
    """The numbers of microbatches around `wanted` that the schedule can run: the nearest on each side, and one more."""
    most = wanted + 2 * parallel.pipeline + 1
    above = (count for count in range(max(1, wanted), most) if not _illegal_count(count, parallel))
    below = (count for count in range(wanted - 1, 0, -1) if not _illegal_count(count, parallel))
    return [*itertools.islice(above, 2), *itertools.islice(below, 1)]


def _or(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"
