"""Bytes that each rank of the pipe needs, before any process starts.

States follow from the ZeRO stage (Rajbhandari et al. 2020, section 3) and from what DeepSpeed keeps beside them.
Activations are counted tensor by tensor as autograd saves them, the way of Korthikanti et al. 2022 (section 4.1),
written anew for RMS norms in fp32, grouped heads and a gated MLP. tests/unit/test_memory.py compares both with counts.
Not counted: CUDA's context, communicators, workspaces of libraries, and what the allocator cannot hand out again.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from stack.config.deepspeed import ds_config
from stack.config.families import FAMILIES, Family
from stack.config.kernels import loss_kernel
from stack.config.model_folder import model_fields
from stack.config.schema import Config
from stack.plan.layout import Plan

#: Bytes of one element.
_WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
_FP32 = 4
#: Tokens whose logits a loss in chunks has at once on a GPU, as in stack/models/loss.py.
_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, by what they are for. On the device unless said otherwise."""

    parameters: int
    masters: int
    """fp32 copies that are updated. DeepSpeed keeps one beside an fp32 parameter too; ZeRO-0 does not."""
    moments: int
    gradients: int
    """fp32 sums as long as microbatches run: whole ones, this rank's shard of them, or both."""
    bucket: int
    """What gradients are reduced through, where it is there all the time."""
    reducing: int
    """What else there is while gradients are reduced."""
    within: int
    """What of that is there while microbatches run, because each of their backwards reduces."""
    gathered: int
    """ZeRO-3: parameters in full."""
    kept: int
    """Activations of the microbatches between their forward and their backward."""
    layer: int
    """What the backward of one layer has beside that: its recomputation, gradients of activations and of one matrix."""
    loss: int
    """What the loss and its backward have beside what is kept."""
    buffers: int
    """Hidden states and their gradients from the neighbours."""
    update: int
    """Gradients while parameters are updated: shards, and the same once more in one flat tensor for the optimizer."""
    whole_gradients: int
    """The part of `gradients` that the reduction at the end of a step turns into shards."""
    microbatches: int
    host: int
    """Offloaded masters, moments, gradients and shards, in host memory."""
    files: int
    """Offloaded masters and moments, in files."""

    @property
    def phases(self) -> dict[str, int]:
        """Bytes when there are most of them in each part of a step."""
        always = self.parameters + self.masters + self.moments + self.bucket + self.buffers
        running = always + self.gathered + self.kept
        # The loss of the only microbatch comes before any gradient.
        before = self.whole_gradients if self.microbatches == 1 else 0
        return {
            "loss": running + self.gradients - before + self.loss if self.loss else 0,
            "layers": running + self.gradients + self.within + self.layer,
            "reduce": always + self.gathered + self.gradients + self.reducing,
            "update": always + self.update,
        }

    @property
    def peak(self) -> int:
        """The most there is at once."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The part of a step in which that is."""
        return max(self.phases, key=self.phases.__getitem__)


def plan_memory(cfg: Config, plan: Plan) -> tuple[RankMemory, ...]:
    """The memory of each rank of the pipe; replicas are alike."""
    layer = layer_activations(cfg, plan)
    return tuple(_rank(cfg, plan, pipe_rank, layer) for pipe_rank in range(plan.pipeline))


def _rank(cfg: Config, plan: Plan, pipe_rank: int, layer: "LayerActivations") -> RankMemory:
    width = _WIDTH[cfg.precision.dtype]
    tokens = plan.micro_size * plan.seq_len
    stages = plan.stages_of(pipe_rank)
    matrix = max(_largest_matrix(plan, stage, layer.inner) for stage in stages)
    # At the start of a layer's backward: all that its forward saves, two gradients of hidden states and two of the
    # MLP's width; then the gradient of a matrix in the compute dtype, and in fp32 if that is another.
    working = tokens * width * 2 * (plan.shape.hidden + layer.inner) + matrix * (
        _FP32 if width == _FP32 else width + _FP32
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
    """What a rank has of parameters, optimizer state and gradients, and where."""
    parallel, zero = cfg.parallel, plan.zero
    width, params = _WIDTH[cfg.precision.dtype], plan.rank_params(pipe_rank)
    shard = -(-params // plan.replicas)
    updated = shard if zero else params
    masters = updated * _FP32 if zero or width < _FP32 else 0
    moments = updated * _FP32 * (2 if cfg.optim.kind == "adamw" else 1 if cfg.optim.momentum else 0)
    whole = params * _FP32 if zero == 0 or parallel.reduce == "step" else 0
    sharded = shard * _FP32 if zero == 3 or (zero and not whole) else 0
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
        "update": 2 * shard * _FP32 if zero else whole,
        "host": 0,
        "files": 0,
    }
    largest = max(plan.shape.layer_params // 4, plan.shape.head_params)
    return _offloaded(cfg, found, shard, largest)


def _offloaded(cfg: Config, found: dict[str, Any], shard: int, largest: int) -> dict[str, Any]:
    """Moves what `parallel.offload` names off the device. On the host DeepSpeed has each shard of the gradients twice
    with ZeRO-3 and with ZeRO-2's sums of microbatches, and for ZeRO-1 and 2 the updated shard in the compute dtype;
    those two leave the reduced gradients on the device until the update has ended, and have room for the `largest`
    parameter here and there."""
    offload, width, three = cfg.parallel.offload, _WIDTH[cfg.precision.dtype], cfg.parallel.zero == 3
    if offload.optimizer != "none":
        found["files" if offload.optimizer == "nvme" else "host"] += found["masters"] + found["moments"]
        twice = offload.optimizer == "cpu" and (three or cfg.parallel.reduce == "microbatch")
        found["host"] += shard * _FP32 * (2 if twice else 1) + (0 if three else (shard + largest) * width)
        found["parameters"] += 0 if three else largest * width
        reduced = 0 if three else shard * _FP32
        sums = found["whole_gradients"] or reduced
        found |= {"masters": 0, "moments": 0, "gradients": sums, "update": reduced or shard * width}
    if offload.params == "cpu":
        found["host"] += shard * width
        found["parameters"] -= shard * width
    return found


def _bucket(cfg: Config, plan: Plan, whole: int) -> dict[str, int]:
    """fp32 elements that are reduced together. ZeRO-3 keeps the bucket, moves gradients into it, and reduces a copy
    into a shard; ZeRO-1 and 2 make it for the reduction, two where one is reduced beside the backward that fills the
    other, and a copy of it. One that holds all gradients is reduced when the backward has ended.

    Args:
        whole: bytes of the whole gradients that are reduced at the end of the step, 0 where each backward reduces.
    """
    if plan.zero == 0:
        return {"bucket": 0, "reducing": 0, "within": 0}
    largest = plan.largest_rank_params
    # As on a GPU, which is what memory is planned for.
    zero = ds_config(cfg, replicas=plan.replicas, rank_params=largest, streams=True)["zero_optimization"]
    size, one = zero["reduce_bucket_size"] * _FP32, zero["reduce_bucket_size"] >= largest
    if plan.zero == 3:
        copies = size + size // plan.replicas
        return {"bucket": size, "reducing": copies - min(size, whole), "within": 0 if whole or one else copies}
    buckets = size * (2 if zero["overlap_comm"] else 1)
    return {"bucket": 0, "reducing": buckets + size, "within": 0 if whole else buckets + (0 if one else size)}


def _gathered(cfg: Config, plan: Plan, pipe_rank: int) -> int:
    """All units of the rank; or those that `stack.parallel.gathering` has at once: the last one of each stage, and two
    in a row. One rank that keeps its parameters on the device uses its shard."""
    if plan.replicas == 1 and cfg.parallel.offload.params == "none":
        return 0
    width = _WIDTH[cfg.precision.dtype]
    if cfg.parallel.gather == "step":
        return plan.rank_params(pipe_rank) * width
    stages = [_units(plan, stage) for stage in plan.stages_of(pipe_rank)]
    return width * (sum(units[-1] for units in stages) + max(map(_two_in_a_row, stages)))


def _units(plan: Plan, stage: int) -> list[int]:
    """Parameters of the units of a stage in the order of its forward."""
    first = [plan.shape.embedding_params] * (stage == 0)
    last = [plan.shape.head_params] * (stage == plan.stages - 1)
    return [*first, *(plan.shape.layer_params for _ in plan.layers_of(stage)), *last]


def _two_in_a_row(units: list[int]) -> int:
    """The largest two neighbours ahead of the last unit, which is counted apart."""
    ahead = units[:-1]
    return max([sum(pair) for pair in itertools.pairwise(ahead)], default=sum(ahead))


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that autograd keeps of a decoder layer, for each token of a microbatch."""

    whole: int
    """Nothing recomputed."""
    kept: int
    """Under `activation.checkpoint`, in the layers that are recomputed; `whole` where none is."""
    norm: int
    """Of one norm of the hidden width and its input."""
    table: int
    """Rotary tables and the mask, once a stage."""
    inner: int
    """Width of the MLP, of all experts that a token is sent to."""


def layer_activations(cfg: Config, plan: Plan) -> LayerActivations:
    """What the layers of the configured model keep. Exact for Llama's layer; close for norms and MLPs of others.

    With w bytes an element, hidden width h, q and kv wide queries and keys, n heads, an MLP i wide:

        norm        4h (its input in fp32, if that is a copy) + 4 + w h (normed) + w h (scaled)
        attention   w (2q + 2kv) + 4n: queries, keys, values, the output, and the softmax's sum of each head
        MLP         4 w i: gate, its activation, up, and their product

    torch.compile recomputes what is pointwise and keeps w (4h + 2q + 2kv + 3i) + 4n + 8.
    """
    shape, width, family, fields = plan.shape, _WIDTH[cfg.precision.dtype], *_family(cfg)
    heads, q = fields["num_attention_heads"], shape.attention_width
    kv = q * (fields.get("num_key_value_heads") or heads) // heads
    experts = fields[family.experts] if family.experts else 0
    matrices = 2 if family.classic else 3
    inner = (shape.layer_weights - shape.hidden * (2 * q + 2 * kv + experts)) // (matrices * shape.hidden)
    masked = cfg.data.pack or (shape.window is not None and shape.window < plan.seq_len)
    attention = _attention(cfg.model.attention, q, kv, heads, plan.seq_len, width, masked=masked)
    norm = _norm(cfg, shape.hidden, width, classic=family.classic)
    if cfg.precision.compile and cfg.model.attention != "eager":
        whole = width * (4 * shape.hidden + 3 * inner) + attention + 8
    else:
        around = _norm(cfg, q, width, classic=False) + _norm(cfg, kv, width, classic=False)
        qk_norms = around if family.qk_norm != "none" else 0
        whole = family.norms * norm + attention + qk_norms + _mlp(cfg, fields, inner) * width
        if family.experts:
            whole += 2 * width * shape.hidden * fields["num_experts_per_tok"] + 2 * _FP32 * experts
    products = width * (2 * shape.hidden + q + 2 * kv + (matrices - 1) * inner)
    if family.experts:
        # The second matrix of each expert that a token is sent to, and the router's.
        products += width * (shape.hidden * (fields["num_experts_per_tok"] - 1) + experts)
    eager = cfg.model.attention == "eager"
    products += width * q + (width * heads * plan.seq_len if eager else _FP32 * heads)
    kept = {"none": whole, "selective": width * shape.hidden + products}
    return LayerActivations(
        whole=whole,
        kept=kept.get(cfg.activation.checkpoint, width * shape.hidden),
        norm=norm,
        table=(2 * width * (q // heads) if family.rotary else 0) + (plan.seq_len if masked else 0),
        inner=inner,
    )


def _family(cfg: Config) -> tuple[Family, dict[str, Any]]:
    given = model_fields(cfg.model)
    family = FAMILIES[given["model_type"]]
    return family, {**family.defaults, **given}


def _attention(kind: str, q: int, kv: int, heads: int, reach: int, width: int, *, masked: bool) -> int:
    """Bytes a token. With a mask SDPA has no grouped heads, and makes it numbers in each layer."""
    if kind == "eager":
        scores = heads * reach * (_FP32 + (width if width < _FP32 else 0))
        return width * 4 * q + scores
    if kind == "sdpa" and masked:
        return width * (4 * q + reach) + _FP32 * heads
    return width * (2 * q + 2 * kv) + _FP32 * heads


def _norm(cfg: Config, size: int, width: int, *, classic: bool) -> int:
    """Bytes a token of a norm and what follows it. A fused kernel and LayerNorm keep their input as it is."""
    if classic:
        return 2 * width * size + 2 * _FP32
    if cfg.kernels.rms_norm == "liger":
        return 2 * width * size + _FP32
    return (_FP32 + 2 * width) * size + _FP32


def _mlp(cfg: Config, fields: dict[str, Any], inner: int) -> int:
    """Elements a token: a fused gate keeps gate and up, and makes its activation again; transformers writes the tanh
    form of GELU as five steps."""
    activation = fields.get("activation_function") or fields.get("hidden_act")
    if FAMILIES[fields["model_type"]].classic:
        return (5 if activation == "gelu_new" else 2) * inner
    return (3 if cfg.kernels.swiglu == "liger" else 4) * inner


def in_flight(plan: Plan, pipe_rank: int) -> int:
    """Microbatches, summed over the stages of a rank, whose forward has run and whose backward has not ended.

    1F1B: one for each rank from here to the end (Narayanan et al. 2019). Several stages on a rank: its warm-up and one
    (Narayanan et al. 2021, section 2.2); where weight gradients are put off, `pipe_rank` more. ZB-V: two for each rank
    (Qi et al. 2024, section 6).
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
    stages, tokens = plan.stages_of(pipe_rank), plan.micro_size * plan.seq_len
    width, hidden = _WIDTH[cfg.precision.dtype], plan.shape.hidden
    every = cfg.activation.every if cfg.activation.checkpoint == "every_k" else 1

    def stage_bytes(stage: int) -> int:
        layers = plan.layers_of(stage)
        recomputed = sum(index % every == 0 for index in layers)
        found = recomputed * layer.kept + (len(layers) - recomputed) * layer.whole + layer.table
        if stage < plan.stages - 1:
            # What it sent.
            return tokens * (found + width * hidden)
        return tokens * (found + layer.norm) + _kept_by_loss(cfg, plan)

    return in_flight(plan, pipe_rank) * sum(map(stage_bytes, stages)) // len(stages)


def _kept_by_loss(cfg: Config, plan: Plan) -> int:
    """Bytes between the forward and the backward of a microbatch: the fp32 log-softmax, or, of a loss in chunks, the
    gradient of its input and the head's in fp32."""
    tokens, shape = plan.micro_size * plan.seq_len, plan.shape
    if loss_kernel(cfg) != "logits":
        return tokens * shape.hidden * _WIDTH[cfg.precision.dtype] + shape.head_params * _FP32
    return tokens * shape.vocab * _FP32


def _loss(cfg: Config, plan: Plan) -> int:
    """Bytes beside what it keeps. Two fp32 gradients of the logits' size, or their gradient in the compute dtype with
    the head's in that and in fp32. In chunks: logits, softmax and gradient of one, or the head's gradient scaled
    and then in fp32."""
    width, head = _WIDTH[cfg.precision.dtype], plan.shape.head_params
    tokens = plan.micro_size * plan.seq_len
    logits = tokens * plan.shape.vocab
    if loss_kernel(cfg) != "logits":
        chunk = min(tokens, _CHUNK_TOKENS) * plan.shape.vocab
        return max(chunk * (2 * _FP32 + 2 * width), head * (width + _FP32))
    return max(2 * _FP32 * logits, (width - _FP32) * logits + head * (width + _FP32))


def _receive_buffers(cfg: Config, plan: Plan, stages: tuple[int, ...], flight: int) -> int:
    """One hidden state and one gradient for each microbatch of the window, from each neighbour there is."""
    window = min(plan.pipeline, plan.microbatches) if plan.schedule == "1f1b" else plan.microbatches
    received = sum((stage > 0) + (stage < plan.stages - 1) for stage in stages)
    hidden = plan.micro_size * plan.seq_len * plan.shape.hidden * _WIDTH[cfg.precision.dtype]
    return received * window * hidden if plan.pipeline > 1 and flight else 0


def _largest_matrix(plan: Plan, stage: int, inner: int) -> int:
    """Parameters of the largest matrix of a stage, but the head: its gradient belongs to the loss."""
    shape = plan.shape
    embedding = shape.embedding_params if stage == 0 else 0
    # An expert's matrices are one tensor with those of the others.
    largest = shape.layer_params // 2 if shape.idle_params else shape.hidden * max(inner, shape.attention_width)
    return max(largest, embedding)
