"""Estimates the memory in bytes that each rank needs, before any process starts.

Model states follow from the ZeRO stage (Rajbhandari et al. 2020, section 3), plus DeepSpeed's buffers. Activations are
the sum of the tensors that autograd saves, by the method of Korthikanti et al. 2022 (section 4.1), with formulas of our
own for RMS norms in fp32, grouped-query attention and a gated MLP. tests/unit/test_memory.py compares both with
measured counts. CUDA's context, communicators, workspaces of libraries and fragmentation of the allocator are not
counted.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from stack.config.deepspeed import ds_config
from stack.config.kernels import loss_kernel
from stack.config.schema import Config
from stack.plan.activations import FP32, WIDTH, LayerActivations, layer_activations
from stack.plan.layout import Plan
from stack.plan.policies import REPLICATED_BUCKET_BYTES

#: Tokens in a chunk of the chunked loss on a GPU, as in stack/models/loss.py.
_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank by use. They are on the device, except for `host` and `files`."""

    parameters: int
    """Parameters, or the rank's shard of them, in the compute dtype."""
    masters: int
    """fp32 master weights. DeepSpeed keeps them even for fp32 parameters. ZeRO-0 in fp32 has none."""
    moments: int
    """Optimizer state in fp32."""
    gradients: int
    """fp32 sums of gradients while microbatches run: whole gradients, the rank's shard of them, or both."""
    bucket: int
    """Buffer for gradient reduction that is allocated all the time."""
    reducing: int
    """Further buffers that are allocated while gradients are reduced."""
    within: int
    """The part of `reducing` that is allocated while microbatches run. It is 0 if gradients are reduced once a step."""
    gathered: int
    """ZeRO-3: gathered whole parameters."""
    kept: int
    """Activations of the microbatches whose forward has run and whose backward has not."""
    layer: int
    """Further memory of the backward of one layer: its recomputed activations, the gradients of activations, and the
    gradient of one matrix."""
    loss: int
    """Further memory of the loss and its backward."""
    buffers: int
    """Receive buffers for hidden states and their gradients from neighbouring stages."""
    update: int
    """Gradients during the optimizer step: the shards, and a copy in one flat tensor for the optimizer."""
    whole_gradients: int
    """The part of `gradients` that the reduction at the end of a step replaces by shards."""
    microbatches: int
    """Number of microbatches in a step, not bytes."""
    host: int
    """Host memory for offloaded masters, moments, gradients and parameter shards."""
    files: int
    """Disk space for offloaded masters and moments."""

    @property
    def phases(self) -> dict[str, int]:
        """Phase of a step (loss, layers, reduce, update) -> largest number of bytes on the device during it."""
        always = self.parameters + self.masters + self.moments + self.bucket + self.buffers
        running = always + self.gathered + self.kept
        # With a single microbatch no gradients exist yet when its loss is computed.
        before = self.whole_gradients if self.microbatches == 1 else 0
        return {
            "loss": running + self.gradients - before + self.loss if self.loss else 0,
            "layers": running + self.gradients + self.within + self.layer,
            "reduce": always + self.gathered + self.gradients + self.reducing,
            "update": always + self.update,
        }

    @property
    def peak(self) -> int:
        """Largest number of bytes on the device at any time of a step."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The phase of a step that has the peak."""
        return max(self.phases, key=self.phases.__getitem__)


def plan_memory(cfg: Config, plan: Plan) -> tuple[RankMemory, ...]:
    """The memory of each rank along the pipeline. All replicas need the same."""
    layer = layer_activations(cfg, plan)
    return tuple(_rank(cfg, plan, pipe_rank, layer) for pipe_rank in range(plan.pipeline))


def _rank(cfg: Config, plan: Plan, pipe_rank: int, layer: LayerActivations) -> RankMemory:
    width = WIDTH[cfg.precision.dtype]
    tokens = plan.micro_size * plan.seq_len
    stages = plan.stages_of(pipe_rank)
    matrix = max(_largest_matrix(plan, stage, layer.inner) for stage in stages)
    # The peak of a layer's backward is at its start: all activations that its forward saves (added below), two
    # gradients of hidden states, two gradients of the MLP's width, and the gradient of a matrix in the compute dtype,
    # and also in fp32 if that differs.
    working = tokens * width * 2 * (plan.shape.hidden + layer.inner) + matrix * (
        FP32 if width == FP32 else width + FP32
    )
    last = plan.stages - 1 in stages
    flight = in_flight(plan, pipe_rank)
    return RankMemory(
        **_states(cfg, plan, pipe_rank),
        kept=_kept(cfg, plan, pipe_rank, layer),
        layer=tokens * (layer.whole - (0 if cfg.activation.checkpoint == "none" else layer.kept)) + working,
        loss=_loss(cfg, plan) if last else 0,
        buffers=_receive_buffers(cfg, plan, stages, flight),
        microbatches=plan.microbatches,
    )


def _states(cfg: Config, plan: Plan, pipe_rank: int) -> dict[str, Any]:
    """The fields of `RankMemory` for parameters, optimizer state and gradients."""
    parallel, zero = cfg.parallel, plan.zero
    width, params = WIDTH[cfg.precision.dtype], plan.rank_params(pipe_rank)
    shard = -(-params // plan.replicas)
    updated = shard if zero else params
    masters = updated * FP32 if zero or width < FP32 else 0
    moments = updated * FP32 * (2 if cfg.optim.kind == "adamw" else 1 if cfg.optim.momentum else 0)
    whole = params * FP32 if zero == 0 or parallel.reduce == "step" else 0
    sharded = shard * FP32 if zero == 3 or (zero and not whole) else 0
    parameters = (shard if zero == 3 else params) * width
    if parallel.hpz > 1:
        parameters += params * width // parallel.hpz
    found = {
        "parameters": parameters,
        "masters": masters,
        "moments": moments,
        "gradients": whole + sharded,
        "whole_gradients": whole,
        **_bucket(cfg, plan, whole),
        "gathered": _gathered(cfg, plan, pipe_rank) if zero == 3 else 0,
        "update": 2 * shard * FP32 if zero else whole,
        "host": 0,
        "files": 0,
    }
    largest = max(plan.shape.layer_params // 4, plan.shape.head_params)
    return _offloaded(cfg, found, shard, largest)


def _offloaded(cfg: Config, found: dict[str, Any], shard: int, largest: int) -> dict[str, Any]:
    """Moves the states that `parallel.offload` names from the device to the host or to files.

    On the host, DeepSpeed keeps two copies of the gradient shards with ZeRO-3, and with ZeRO-2 if gradients are summed
    over microbatches. ZeRO-1 and 2 also keep the updated shard in the compute dtype on the host, leave the reduced
    gradients on the device until the optimizer step has ended, and keep a buffer for the largest parameter on both.

    Args:
        cfg: config of the run.
        found: fields of `RankMemory` without offload; modified and returned.
        shard: parameters in the rank's shard.
        largest: elements of the largest parameter.
    """
    offload, width, three = cfg.parallel.offload, WIDTH[cfg.precision.dtype], cfg.parallel.zero == 3
    if offload.optimizer != "none":
        found["files" if offload.optimizer == "nvme" else "host"] += found["masters"] + found["moments"]
        twice = offload.optimizer == "cpu" and (three or cfg.parallel.reduce == "microbatch")
        found["host"] += shard * FP32 * (2 if twice else 1) + (0 if three else (shard + largest) * width)
        found["parameters"] += 0 if three else largest * width
        reduced = 0 if three else shard * FP32
        sums = found["whole_gradients"] or reduced
        found |= {"masters": 0, "moments": 0, "gradients": sums, "update": reduced or shard * width}
    if offload.params == "cpu":
        found["host"] += shard * width
        found["parameters"] -= shard * width
    return found


def _bucket(cfg: Config, plan: Plan, whole: int) -> dict[str, int]:
    """Bytes of the buffers for gradient reduction: the fields `bucket`, `reducing` and `within` of `RankMemory`.

    ZeRO-0 reduces copies of its gradients. ZeRO-3 keeps the bucket, moves gradients into it, and reduces a copy of it
    into a shard. ZeRO-1 and 2 allocate the bucket and a copy of it for the reduction. With overlap they allocate two
    buckets, of which one is reduced while the backward fills the other. A bucket that holds all gradients is reduced
    only after the backward has ended.

    Args:
        cfg: config of the run.
        plan: its layout.
        whole: bytes of the whole gradients if they are reduced at the end of the step; 0 if each backward reduces.
    """
    largest = plan.largest_rank_params
    if plan.zero == 0:
        copied = min(REPLICATED_BUCKET_BYTES, largest * FP32) if plan.replicas > 1 else 0
        return {"bucket": 0, "reducing": copied, "within": 0}
    # The estimate is for a GPU, which has streams.
    zero = ds_config(cfg, replicas=plan.replicas, rank_params=largest, streams=True)["zero_optimization"]
    size, one = zero["reduce_bucket_size"] * FP32, zero["reduce_bucket_size"] >= largest
    if plan.zero == 3:
        copies = size + size // plan.replicas
        return {"bucket": size, "reducing": copies - min(size, whole), "within": 0 if whole or one else copies}
    buckets = size * (2 if zero["overlap_comm"] else 1)
    return {"bucket": 0, "reducing": buckets + size, "within": 0 if whole else buckets + (0 if one else size)}


def _gathered(cfg: Config, plan: Plan, pipe_rank: int) -> int:
    """Bytes of gathered parameters with ZeRO-3.

    With gather=step these are all parameters of the rank. With gather=microbatch they are the units that
    `stack.parallel.gathering` holds at once: the last unit of each stage, and two consecutive ones. A single replica
    whose parameters are on the device gathers nothing, since its shard is the whole.
    """
    if plan.replicas == 1 and cfg.parallel.offload.params == "none":
        return 0
    width = WIDTH[cfg.precision.dtype]
    if cfg.parallel.gather == "step":
        return plan.rank_params(pipe_rank) * width
    stages = [_units(plan, stage) for stage in plan.stages_of(pipe_rank)]
    return width * (sum(units[-1] for units in stages) + max(map(_two_in_a_row, stages)))


def _units(plan: Plan, stage: int) -> list[int]:
    """Parameters of the units of a stage (embedding, decoder layers, head), in the order of its forward."""
    first = [plan.shape.embedding_params] * (stage == 0)
    last = [plan.shape.head_params] * (stage == plan.stages - 1)
    return [*first, *(plan.shape.layer_params for _ in plan.layers_of(stage)), *last]


def _two_in_a_row(units: list[int]) -> int:
    """Parameters of the largest two consecutive units, without the last unit, which the caller counts separately."""
    ahead = units[:-1]
    return max([sum(pair) for pair in itertools.pairwise(ahead)], default=sum(ahead))


def in_flight(plan: Plan, pipe_rank: int) -> int:
    """Largest number of microbatches whose forward has run and whose backward has not ended, summed over the stages of
    a rank.

    1F1B: one for this rank and each rank behind it (Narayanan et al. 2019). Interleaved schedules: the warm-up and one
    (Narayanan et al. 2021, section 2.2); with zero bubble, whose weight gradients are delayed, `pipe_rank` more. ZB-V:
    two for each rank of the pipeline (Qi et al. 2024, section 6).
    """
    ranks, virtual, behind = plan.pipeline, plan.stages // plan.pipeline, plan.pipeline - 1 - pipe_rank
    count = plan.microbatches
    each_round = count // max(1, count // ranks)
    found = {
        "1f1b": behind + 1,
        "gpipe": count,
        "interleaved_1f1b": (virtual - 1) * each_round + 2 * behind + 1,
        "interleaved_zero_bubble": (virtual - 1) * each_round + behind + 1 + pipe_rank,
        "zbv": 2 * ranks,
    }[plan.schedule]
    return min(found, count * virtual)


def _kept(cfg: Config, plan: Plan, pipe_rank: int, layer: LayerActivations) -> int:
    """Bytes of the activations of all microbatches in flight on a rank."""
    stages, tokens = plan.stages_of(pipe_rank), plan.micro_size * plan.seq_len
    width, hidden = WIDTH[cfg.precision.dtype], plan.shape.hidden
    every = cfg.activation.every if cfg.activation.checkpoint == "every_k" else 1

    def stage_bytes(stage: int) -> int:
        layers = plan.layers_of(stage)
        recomputed = sum(index % every == 0 for index in layers)
        found = recomputed * layer.kept + (len(layers) - recomputed) * layer.whole + layer.table
        if stage < plan.stages - 1:
            # Plus the hidden states that the stage sent to the next one.
            return tokens * (found + width * hidden)
        return tokens * (found + layer.norm) + _kept_by_loss(cfg, plan)

    return in_flight(plan, pipe_rank) * sum(map(stage_bytes, stages)) // len(stages)


def _kept_by_loss(cfg: Config, plan: Plan) -> int:
    """Bytes that the loss keeps between the forward and the backward of a microbatch: the fp32 log-softmax, or for a
    chunked loss the gradient of its input and the fp32 gradient of the head."""
    tokens, shape = plan.micro_size * plan.seq_len, plan.shape
    if loss_kernel(cfg) != "logits":
        return tokens * shape.hidden * WIDTH[cfg.precision.dtype] + shape.head_params * FP32
    return tokens * shape.vocab * FP32


def _loss(cfg: Config, plan: Plan) -> int:
    """Largest number of bytes during the loss and its backward, besides those of `_kept_by_loss`.

    With whole logits: two fp32 gradients of the size of the logits; or later the gradient of the logits in the compute
    dtype, together with the head's gradient in the compute dtype and in fp32. With a chunked loss: logits, softmax and
    gradient of one chunk; or later the head's gradient in the compute dtype and in fp32.
    """
    width, head = WIDTH[cfg.precision.dtype], plan.shape.head_params
    tokens = plan.micro_size * plan.seq_len
    logits = tokens * plan.shape.vocab
    if loss_kernel(cfg) != "logits":
        chunk = min(tokens, _CHUNK_TOKENS) * plan.shape.vocab
        return max(chunk * (2 * FP32 + 2 * width), head * (width + FP32))
    return max(2 * FP32 * logits, (width - FP32) * logits + head * (width + FP32))


def _receive_buffers(cfg: Config, plan: Plan, stages: tuple[int, ...], flight: int) -> int:
    """Bytes of the receive buffers: a hidden state of each microbatch in the window from the previous stage, and a
    gradient of each from the next stage."""
    window = min(plan.pipeline, plan.microbatches) if plan.schedule == "1f1b" else plan.microbatches
    received = sum((stage > 0) + (stage < plan.stages - 1) for stage in stages)
    hidden = plan.micro_size * plan.seq_len * plan.shape.hidden * WIDTH[cfg.precision.dtype]
    return received * window * hidden if plan.pipeline > 1 and flight else 0


def _largest_matrix(plan: Plan, stage: int, inner: int) -> int:
    """Parameters of the largest matrix of a stage. The head is left out, because `_loss` counts its gradient."""
    shape = plan.shape
    embedding = shape.embedding_params if stage == 0 else 0
    # The matrices of all experts are one tensor.
    largest = shape.layer_params // 2 if shape.idle_params else shape.hidden * max(inner, shape.attention_width)
    return max(largest, embedding)
