"""The plan as text: every derived number with its reason."""

from stack.config.schema import Config
from stack.plan.layout import Plan
from stack.plan.policies import SCHEDULES


def render(plan: Plan, cfg: Config) -> str:
    """The table that `stack plan` prints and that is saved as plan.txt."""
    tokens = plan.global_size * plan.seq_len
    rows = [
        ("model", f"{_count(plan.shape.total_params)} parameters", _model(plan, cfg)),
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
        ("checkpointing", cfg.activation.checkpoint, "activation.checkpoint"),
        ("dtype", cfg.precision.dtype, "compute; masters, optimizer state and gradient sums are fp32"),
        ("microbatches", plan.microbatches, plan.reasons["microbatches"]),
        ("tokens a step", f"{tokens:,}", f"{plan.global_size} sequences x {plan.seq_len} tokens"),
        ("tokens in all", f"{tokens * cfg.train.steps:,}", f"{cfg.train.steps} steps"),
        ("bubble", f"{bubble(plan):.1%}", _bubble_formula(plan)),
    ]
    width = max(len(str(value)) for _, value, _ in rows)
    lines = [f"{name:<14} {value!s:<{width}}  {reason}" for name, value, reason in rows]
    return "\n".join([*lines, "", *_stage_table(plan)])


def _model(plan: Plan, cfg: Config) -> str:
    shape = plan.shape
    active = f", {_count(shape.active_params)} at work for a token" if shape.active_params < shape.total_params else ""
    return f"{cfg.model.name}, {shape.layers} layers{active}"


def bubble(plan: Plan) -> float:
    """Idle share of a step with equal stages, for 1F1B and GPipe alike; several stages on a rank divide it by their
    number (Narayanan et al. 2021, section 2.2). A schedule that splits the backward fills all of it but the start."""
    if SCHEDULES[plan.schedule].splits_backward:
        return 0.0
    idle = (plan.pipeline - 1) * plan.pipeline / plan.stages
    return idle / (plan.microbatches + idle)


def _bubble_formula(plan: Plan) -> str:
    if SCHEDULES[plan.schedule].splits_backward:
        return "weight gradients fill it, if all stages and both parts of the backward were equal"
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
    "step": "parameters gathered at the start of the step and held",
    "microbatch": "parameters gathered again for every microbatch",
}


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


def _count(number: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
