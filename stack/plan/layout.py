"""Computes the layout of a run: assigns ranks to pipeline stages and replicas, layers to stages, and sequences to
microbatches.

The layout is arithmetic only. It is computed before any process starts, and saved as a frozen `Plan`.
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

#: Largest number of legal values that an error lists.
_MOST_OFFERED = 12
#: Range around the given microbatch size that is searched for legal ones.
_NEAR = 32


@dataclass(frozen=True)
class Plan:
    """The layout of a run.

    The pipeline is the outer axis of the rank grid: rank = pipe_rank * replicas + replica. The ranks of a data-parallel
    group are therefore consecutive and on one host if they fit, so that only hidden states cross hosts.
    """

    world_size: int
    """Number of ranks."""
    nodes: int
    """Number of hosts."""
    pipeline: int
    """Ranks along the pipeline."""
    stages: int
    """Parts into which the decoder layers are cut; a rank holds stages / pipeline of them."""
    replicas: int
    """Ranks in a data-parallel group."""
    zero: int
    """ZeRO stage."""
    schedule: str
    """Pipeline schedule, a key of `SCHEDULES`."""
    shape: ModelShape
    seq_len: int
    """Tokens in a sequence."""
    global_size: int
    """Sequences in a step."""
    micro_size: int
    """Sequences in a microbatch of one replica."""
    microbatches: int
    """Microbatches of one replica in a step."""
    first_layers: tuple[int, ...]
    """Index of the first decoder layer of each stage."""
    reasons: dict[str, str]
    """Name of a number in the plan -> how it was derived, as text."""

    @property
    def summary(self) -> str:
        """The layout in a few words, such as `PP2 x DP2, ZeRO-3, 1f1b`."""
        return f"PP{self.pipeline} x DP{self.replicas}, ZeRO-{self.zero}, {self.schedule}"

    def pipe_rank_of(self, rank: int) -> int:
        return rank // self.replicas

    def replica_of(self, rank: int) -> int:
        return rank % self.replicas

    def rank_of(self, pipe_rank: int, replica: int) -> int:
        return pipe_rank * self.replicas + replica

    def stages_of(self, pipe_rank: int) -> tuple[int, ...]:
        """Stages that the ranks with this position in the pipeline hold, in the order of the forward. Stages are
        assigned round-robin. In a folded schedule every other round is reversed, so that the stages form a V."""
        rounds = range(0, self.stages, self.pipeline)
        if SCHEDULES[self.schedule].folded:
            return tuple(
                start + (self.pipeline - 1 - pipe_rank if turn % 2 else pipe_rank) for turn, start in enumerate(rounds)
            )
        return tuple(start + pipe_rank for start in rounds)

    def holder_of(self, stage: int) -> int:
        """Position in the pipeline of the ranks that hold a stage."""
        turn, place = divmod(stage, self.pipeline)
        return self.pipeline - 1 - place if turn % 2 and SCHEDULES[self.schedule].folded else place

    @property
    def tied_apart(self) -> bool:
        """Whether the token embedding and the head tied to it are on different ranks."""
        return self.shape.tied and self.holder_of(0) != self.holder_of(self.stages - 1)

    def layers_of(self, stage: int) -> range:
        """Indices of the decoder layers of a stage."""
        ends = (*self.first_layers[1:], self.shape.layers)
        return range(self.first_layers[stage], ends[stage])

    def stage_params(self, stage: int) -> int:
        """Parameters of a stage, before ZeRO shards them over the data-parallel group."""
        first = self.shape.embedding_params if stage == 0 else 0
        last = self.shape.norm_params + self.shape.head_params if stage == self.stages - 1 else 0
        if stage == self.stages - 1 and self.shape.tied and not self.tied_apart:
            last -= self.shape.head_params
        return len(self.layers_of(stage)) * self.shape.layer_params + first + last

    def rank_params(self, pipe_rank: int) -> int:
        """Parameters of all stages that a rank holds, before ZeRO shards them."""
        return sum(map(self.stage_params, self.stages_of(pipe_rank)))

    @cached_property
    def largest_rank_params(self) -> int:
        """The largest of `rank_params`."""
        return max(map(self.rank_params, range(self.pipeline)))

    def stage_flops(self, stage: int) -> float:
        """Forward FLOPs of a stage per token."""
        head = self.shape.head_flops if stage == self.stages - 1 else 0
        return len(self.layers_of(stage)) * self.shape.layer_flops(self.seq_len) + head

    def to_dict(self) -> dict:
        """The plan as plain values for plan.json, with a table of the stages."""
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
    """Computes the layout of a run.

    Args:
        cfg: config of the run.
        world_size: number of ranks; by default it follows from `cfg.launch`, and `nodes` is ignored.
        nodes: number of hosts.

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
    """Size of a data-parallel group.

    Args:
        parallel: section of the config.
        world_size: number of ranks.
        ranks: the number of ranks and where it comes from, as text for messages.

    Raises:
        LayoutError: parallel.pipeline does not divide the ranks, or parallel.data contradicts it.
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
        return balanced_split(shape, stages, seq_len), "FLOPs of the stages balanced, including the head"
    split = tuple(parallel.split)
    if len(split) != stages or split[-1] >= shape.layers:
        even = [stage * shape.layers // stages for stage in range(stages)]
        raise LayoutError(
            f"parallel.split={list(split)} must name the first of {shape.layers} layers for each of {stages} stages; "
            f"use for example {even}"
        )
    return split, "parallel.split"


def balanced_split(shape: ModelShape, stages: int, seq_len: int) -> tuple[int, ...]:
    """The first layer of each stage, chosen so that the most expensive stage is as cheap as possible.

    The cost of a stage is its share of the FLOPs, including the output projection on the last stage. A hundredth of its
    share of the parameters is added, to decide between splits of equal FLOPs. Every stage gets at least one layer.
    Among equally cheap splits the one with the largest last stage is taken, and the stages before it are split in the
    same way.
    """
    flops = shape.layers * shape.layer_flops(seq_len) + shape.head_flops
    params = max(shape.total_params, 1)
    layer = shape.layer_flops(seq_len) / flops + 0.01 * shape.layer_params / params
    first = 0.01 * shape.embedding_params / params
    head = shape.head_flops / flops + 0.01 * shape.head_params / params

    def ahead(count: int, layers: int) -> float:
        """Cost of the most expensive of the first `count` stages, if these have `layers` layers together. The first
        stage also has the embedding; the other stages share the remaining layers evenly."""
        if count == 1:
            return layers * layer + first
        return _balance(
            range(1, layers - count + 2),
            growing=lambda own: own * layer + first,
            falling=lambda own: math.ceil((layers - own) / (count - 1)) * layer,
        )[1]

    def start_of_last(count: int, layers: int, extra: float) -> int:
        """First layer of the last one of `count` stages that have `layers` layers together. `extra` is the cost of the
        head on that stage."""
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
    """Finds the smallest number that minimizes max(growing(number), falling(number)).

    Args:
        numbers: candidates in ascending order.
        growing: a function that does not decrease.
        falling: a function that does not increase.

    Returns:
        The number, and the minimum.
    """
    meet = bisect_left(numbers, True, key=lambda number: growing(number) >= falling(number))
    near = numbers[max(meet - 1, 0) : meet + 1]
    return min(((number, max(growing(number), falling(number))) for number in near), key=lambda found: found[1])


def _microbatches(cfg: Config, replicas: int, ranks: str) -> int:
    """Microbatches of a replica in a step, from global_size = micro_size x microbatches x replicas.

    Raises:
        LayoutError: the number is not whole, or the schedule cannot run so many.
    """
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
    """The reason why the schedule cannot run this number of microbatches; empty if it can."""
    ranks = parallel.pipeline
    if parallel.schedule == "1f1b" and microbatches < ranks:
        return f"needs one for each of {ranks} stages"
    if parallel.schedule.startswith("interleaved") and microbatches % max(1, microbatches // ranks):
        return f"runs them in equal rounds of {ranks} or more"
    return ""


def _nearest_batches(size: int, micro: int, replicas: int, parallel: Parallel) -> str:
    """The three legal combinations of global_size, micro_size and microbatches with the smallest relative changes, as
    text for messages."""
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
    """Candidates for the microbatch size: small ones, those around `micro`, and those that keep the global size about
    the same with few microbatches."""
    few = {size // (replicas * count) for count in range(pipeline, pipeline + _NEAR)}
    found = {*range(1, _NEAR), *range(micro - _NEAR, micro + _NEAR), *few}
    return {candidate for candidate in found if 1 <= candidate <= 2 * micro}


def _legal_counts(wanted: int, parallel: Parallel) -> list[int]:
    """Numbers of microbatches that the schedule can run: the two smallest from `wanted` up, and the largest below."""
    most = wanted + 2 * parallel.pipeline + 1
    above = (count for count in range(max(1, wanted), most) if not _illegal_count(count, parallel))
    below = (count for count in range(wanted - 1, 0, -1) if not _illegal_count(count, parallel))
    return [*itertools.islice(above, 2), *itertools.islice(below, 1)]


def _or(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"
