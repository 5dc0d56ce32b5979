"""The plan as text: every derived number with its reason."""

from collections.abc import Callable

from stack import disk
from stack.config.auto import decay_steps
from stack.config.schema import Config
from stack.config.values import show
from stack.plan.layout import Plan
from stack.plan.memory import RankMemory, plan_memory
from stack.plan.policies import SCHEDULES, state_names


def render(plan: Plan, cfg: Config, *, sequences: int | None = None) -> str:
    """The table that `stack plan` prints. A run saves it as plan.txt.

    Args:
        sequences: sequences in one epoch; None if the corpus is not prepared.
    """
    tokens = plan.global_size * plan.seq_len
    rows = [
        ("model", f"{_count(plan.shape.total_params)} parameters", _model(plan, cfg)),
        ("weights", cfg.model.init, _WEIGHTS[cfg.model.init].format(cfg=cfg)),
        ("corpus", cfg.data.source, _corpus(cfg)),
        ("tokenizer", *_tokenizer(cfg)),
        ("ranks", plan.world_size, plan.reasons["ranks"]),
        ("stages", plan.stages, _stages(plan)),
        ("replicas", plan.replicas, plan.reasons["replicas"]),
        ("ZeRO stage", plan.zero, f"over the {plan.replicas} ranks of a data group"),
        ("schedule", plan.schedule, "parallel.schedule"),
        ("reduce", cfg.parallel.reduce, _REDUCE[cfg.parallel.reduce]),
    ]
    if plan.zero == 3:
        rows.append(("gather", cfg.parallel.gather, _GATHER[cfg.parallel.gather]))
    rows += [
        ("learning rate", f"{cfg.optim.lr:g}", _course(cfg)),
        ("recompute", cfg.activation.checkpoint, "activation.checkpoint"),
        ("dtype", cfg.precision.dtype, "compute; master weights, optimizer state and gradient sums are fp32"),
        ("microbatches", plan.microbatches, plan.reasons["microbatches"]),
        ("tokens a step", f"{tokens:,}", f"{plan.global_size} sequences x {plan.seq_len} tokens"),
        ("total tokens", f"{tokens * cfg.train.steps:,}", f"{cfg.train.steps} steps"),
        *_epochs(plan, cfg, sequences),
        ("bubble", f"{bubble(plan):.1%}", _bubble_formula(plan)),
        _checkpoint(plan, cfg),
    ]
    width = max(len(str(value)) for _, value, _ in rows)
    lines = [f"{name:<14} {value!s:<{width}}  {reason}" for name, value, reason in rows]
    return "\n".join([*lines, "", *_stage_table(plan), "", *_memory_table(plan, cfg)])


def _checkpoint(plan: Plan, cfg: Config) -> tuple[str, str, str]:
    every, kept = cfg.checkpoint.every, cfg.checkpoint.keep_last
    if every == 0:
        return "checkpoint", "none", "checkpoint.every"
    size = 4 * len(state_names(cfg))
    share = plan.largest_rank_params * size // plan.replicas
    staged = f"; async_save takes {disk.size(share)} of a rank's host memory" if cfg.checkpoint.async_save else ""
    return "checkpoint", disk.size(plan.shape.total_params * size), f"every {every} steps, {kept} kept{staged}"


def _epochs(plan: Plan, cfg: Config, sequences: int | None) -> list[tuple[str, str, str]]:
    if not sequences:
        return []
    count = plan.global_size * cfg.train.steps
    return [("epochs", f"{count / sequences:.2f}", f"{count:,} sequences, and an epoch has {sequences:,}")]


def _model(plan: Plan, cfg: Config) -> str:
    shape = plan.shape
    active = f", {_count(shape.active_params)} active per token" if shape.active_params < shape.total_params else ""
    return f"{cfg.model.name}, {shape.layers} layers{active}"


def bubble(plan: Plan) -> float:
    """Idle share of a step with equal stages, for 1F1B and GPipe alike. Several stages on a rank divide the idle time
    by their number (Narayanan et al. 2021, section 2.2). For a schedule that splits the backward the result is 0:
    weight gradients fill all idle time but the start."""
    if SCHEDULES[plan.schedule].splits_backward:
        return 0.0
    idle = (plan.pipeline - 1) * plan.pipeline / plan.stages
    return idle / (plan.microbatches + idle)


def _bubble_formula(plan: Plan) -> str:
    if SCHEDULES[plan.schedule].splits_backward:
        return "weight gradients fill the bubble, if all stages and both parts of the backward were equal"
    virtual = plan.stages // plan.pipeline
    idle = "(pipeline - 1)" if virtual == 1 else f"(pipeline - 1)/{virtual}"
    return f"{idle} / (microbatches + {idle}), if all stages were equal"


def _stages(plan: Plan) -> str:
    virtual = plan.stages // plan.pipeline
    return "parallel.pipeline" if virtual == 1 else f"parallel.pipeline {plan.pipeline} x virtual_stages {virtual}"


_REDUCE = {
    "step": "gradients reduced once a step",
    "microbatch": "gradients reduced after every backward",
}
_GATHER = {
    "step": "parameters gathered at the start of the step and kept",
    "microbatch": "parameters gathered again for every microbatch",
}


_WEIGHTS = {
    "scratch": "drawn from run.seed {cfg.run.seed}",
    "pretrained": "read from {cfg.model.name}",
}


def _corpus(cfg: Config) -> str:
    data = cfg.data
    if data.source == "python_stdlib":
        return "source text of this interpreter's standard library"
    if data.source == "files":
        more = f" and {len(data.paths) - 1} more" if data.paths[1:] else ""
        return show(data.paths[0]) + more
    return f"{data.name}{f', {data.subset}' if data.subset else ''}, split {data.split}"


def _tokenizer(cfg: Config) -> tuple[str, str]:
    if cfg.data.tokenizer == "bpe":
        return "bpe", f"byte-level, {cfg.data.vocab_size:,} entries, learnt from the corpus"
    return "pretrained", cfg.data.tokenizer


def _course(cfg: Config) -> str:
    """The learning rate over the steps."""
    optim, schedule, steps = cfg.optim, cfg.schedule, cfg.train.steps
    warmup = f"warm-up over {schedule.warmup_steps} steps" if schedule.warmup_steps else "no warm-up"
    if schedule.kind == "constant":
        return f"{optim.kind}; {warmup}, then constant"
    over = f" over the last {decay_steps(schedule, steps)} steps" if schedule.kind == "wsd" else f" to step {steps}"
    return f"{optim.kind}; {warmup}, then {schedule.kind} to {optim.lr * schedule.min_lr_ratio:g}{over}"


def _stage_table(plan: Plan) -> list[str]:
    total = sum(plan.stage_flops(stage) for stage in range(plan.stages))
    lines = [
        f"split: {plan.reasons['split']}",
        f"{'stage':>5}  {'layers':<9} {'also':<16} {'parameters':>10}  {'FLOPs':>6}  ranks",
    ]
    for stage in range(plan.stages):
        layers = plan.layers_of(stage)
        also = [name for name, here in (("embedding", stage == 0), ("head", stage == plan.stages - 1)) if here]
        holder = plan.holder_of(stage)
        ranks = f"{plan.rank_of(holder, 0)}-{plan.rank_of(holder, plan.replicas - 1)}"
        lines.append(
            f"{stage:>5}  {f'{layers.start}-{layers.stop - 1}':<9} {', '.join(also):<16} "
            f"{_count(plan.stage_params(stage)):>10}  {plan.stage_flops(stage) / total:>6.1%}  {ranks}"
        )
    return lines


def _memory_table(plan: Plan, cfg: Config) -> list[str]:
    """A row for each rank of the pipe. The peak is less than the sum of the row, since not all parts exist at once."""
    ranks = plan_memory(cfg, plan)
    unit, size = ("GiB", 2**30) if max(rank.peak for rank in ranks) >= 2**29 else ("MiB", 2**20)
    columns: dict[str, Callable[[RankMemory], int]] = {
        "states": lambda rank: rank.parameters + rank.masters + rank.moments,
        "gradients": lambda rank: rank.gradients + rank.bucket + rank.reducing,
        "gathered": lambda rank: rank.gathered,
        "activations": lambda rank: rank.kept + rank.layer,
        "loss": lambda rank: rank.loss,
        "host": lambda rank: rank.host,
        "files": lambda rank: rank.files,
        "peak": lambda rank: rank.peak,
    }
    used = {name: of for name, of in columns.items() if any(map(of, ranks))}
    largest = max(range(len(ranks)), key=lambda pipe_rank: ranks[pipe_rank].peak)
    lines = [
        f"memory: {unit} on the device, without CUDA's own memory; largest in rank {plan.rank_of(largest, 0)}",
        "  ".join(["ranks  ", *(f"{name:>9}" for name in used), "in"]),
    ]
    for pipe_rank, rank in enumerate(ranks):
        first, last = plan.rank_of(pipe_rank, 0), plan.rank_of(pipe_rank, plan.replicas - 1)
        ids = f"{first}-{last}" if last > first else str(first)
        cells = (f"{of(rank) / size:>{max(9, len(name))}.2f}" for name, of in used.items())
        lines.append("  ".join([f"{ids:<7}", *cells, rank.peak_phase]))
    return lines


def _count(number: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
