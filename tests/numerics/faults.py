"""Deliberate faults, each with a case of the parity matrix that must find it.

A fault patches `stack` inside the ranks. It leaves out or repeats one thing that is easy to get wrong, and that raises
no exception.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.helpers.layouts import run_layout
from tests.helpers.tiny import SHAPE
from tests.numerics.matrix import Case

_Change = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Fault:
    """A fault and the case that finds it."""

    change: _Change
    """Makes the fault; called on every rank."""
    case: Case
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of the run, which the plan may refuse without the fault."""


FAULTS: dict[str, Fault] = {}

_BASE = Case(
    schedule="1f1b",
    zero=3,
    checkpoint="none",
    reduce="step",
    pipeline=2,
    ranks=4,
    gather="step",
    split="auto",
    micro=1,
    family="llama",
    tied=False,
    kind="padded",
    optimizer="adamw",
    clip=0.5,
)


def run_with_fault(name: str, settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """`run_layout` with the fault `name`. Called on every rank."""
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[name].change(patch)
        return run_layout(settings, kind)


def _shown_by(*, settings: dict[str, Any] | None = None, **values: Any) -> Callable[[_Change], _Change]:
    def add(change: _Change) -> _Change:
        FAULTS[change.__name__] = Fault(change, dataclasses.replace(_BASE, **values), settings or {})
        return change

    return add


def _wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replaces a function or method by `wrapper(real, *args, **kwargs)`, which gets the original as `real`."""
    real = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: wrapper(real, *args, **kwargs))


def _after_init(patch: pytest.MonkeyPatch, owner: Any, change: Callable[[Any], None]) -> None:
    def init(real: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        change(self)

    _wrap(patch, owner, "__init__", init)


# The global norm and clipping.


@_shown_by(zero=2)
def later_stages_not_marked_for_the_norm(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel.rank_engine import RankEngine

    def unmark(engine: Any) -> None:
        for parameter in engine.parameters:
            parameter.model_parallel = engine.stages[0].first

    _after_init(patch, RankEngine, unmark)


@_shown_by(tied=True)
def tied_copy_counted_twice_in_the_norm(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel.rank_engine import RankEngine

    def mark(engine: Any) -> None:
        if engine.tied is not None:
            engine.tied.model_parallel = True

    _after_init(patch, RankEngine, mark)


@_shown_by()
def norm_over_one_stage(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel import zero

    _wrap(patch, zero, "global_norm", lambda real, found, *groups, **options: real(found, *groups[:-1], **options))


@_shown_by(zero=0)
def norm_over_one_stage_of_plain_replicas(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel import replicated

    _wrap(patch, replicated, "global_norm", lambda real, found, *groups: real(found, *groups[:-1]))


@_shown_by(zero=0)
def clipped_by_the_norm_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel import replicated

    _wrap(
        patch,
        replicated,
        "clip",
        lambda real, found, _norm, limit: real(found, torch.nn.utils.get_total_norm(found), limit),
    )


# Sums over microbatches, replicas and stages.


@_shown_by(schedule="gpipe", reduce="microbatch")
def backward_seen_flag_not_cleared(patch: pytest.MonkeyPatch) -> None:
    # GPipe runs all its backwards in a row. The last two backwards of a shallow 1F1B are in a row too, but there the
    # gradients happen to be added correctly.
    from stack.parallel.zero import ZeroEngine

    def backward(real: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        self._optimizer.clear_backward_seen_flag = lambda: None
        real(self, *args, **kwargs)
        del self._optimizer.clear_backward_seen_flag

    _wrap(patch, ZeroEngine, "backward", backward)


@_shown_by(schedule="interleaved_1f1b", zero=2, settings={"parallel__reduce": "microbatch"})
def second_chunk_reduced_onto_the_last_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("stack.plan.policies._check_reduce", lambda *_: None)


@_shown_by(zero=0)
def gradients_of_the_last_step_kept(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel.replicated import ReplicatedEngine

    def step(real: Any, self: Any, lr: float) -> float:
        kept = [parameter.grad for parameter in self.parameters]
        norm = real(self, lr)
        for parameter, gradient in zip(self.parameters, kept, strict=True):
            parameter.grad = gradient
        return norm

    _wrap(patch, ReplicatedEngine, "step", step)


@_shown_by(schedule="zbv", zero=1)
def weight_gradient_overwrites_the_one_before(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel.rank_engine import RankEngine

    def backward_weight(real: Any, self: Any, index: int, groups: Any) -> None:
        for parameter in self.stages[index].parameters():
            parameter.grad = None
        real(self, index, groups)

    _wrap(patch, RankEngine, "backward_weight", backward_weight)


@_shown_by(zero=0)
def one_backward_skipped(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel.replicated import ReplicatedEngine

    skipped: list[bool] = []

    def backward(real: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        # On the first stage, because no other stage waits for its gradient.
        if self.stages[0].first and not skipped:
            skipped.append(True)
        else:
            real(self, *args, **kwargs)

    _wrap(patch, ReplicatedEngine, "backward", backward)


@_shown_by(zero=0)
def replicas_not_averaged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("stack.parallel.replicated.average", lambda *_: None)


@_shown_by(zero=1)
def one_replica_left_out(patch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from stack.parallel.zero import ZeroEngine

    def backward(real: Any, self: Any, output: torch.Tensor, gradient: Any, *, last: bool) -> None:
        silent = dist.get_rank() == 1
        real(self, output, gradient, last=last)
        if silent:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()

    _wrap(patch, ZeroEngine, "backward", backward)


@_shown_by(tied=True)
def tied_gradients_not_added(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel.rank_engine import RankEngine

    patch.setattr(RankEngine, "sum_tied", lambda *_: None)
    # Without this the engine itself would notice the fault.
    patch.setattr(RankEngine, "check_tied", lambda _: None)


# Scales.


@_shown_by()
def loss_scaled_twice(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel import engine

    def make_schedule(real: Any, *args: Any, loss_scale: Callable[[], float], **kwargs: Any) -> Any:
        return real(*args, loss_scale=lambda: loss_scale() ** 2, **kwargs)

    _wrap(patch, engine, "make_schedule", make_schedule)


@_shown_by()
def targets_counted_on_each_replica(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel.engine import Engine

    def train_batch(real: Any, self: Any, batch: Any, **kwargs: Any) -> Any:
        own = int((batch.labels != -100).sum()) * self._plan.replicas
        return real(self, dataclasses.replace(batch, global_target_tokens=own), **kwargs)

    _wrap(patch, Engine, "train_batch", train_batch)


@_shown_by(zero=0)
def norms_and_biases_decayed(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel import replicated

    def make_optimizer(real: Any, parameters: Any, cfg: Any, **kwargs: Any) -> Any:
        optimizer = real(parameters, cfg, **kwargs)
        for group in optimizer.param_groups:
            group["weight_decay"] = cfg.optim.weight_decay
        return optimizer

    _wrap(patch, replicated, "make_optimizer", make_optimizer)


# Parts of a family's forward that must happen on one stage only.


@_shown_by(family="granite")
def embedding_multiplier_on_each_stage(patch: pytest.MonkeyPatch) -> None:
    from stack.models.families import FAMILIES, Family

    patch.setitem(FAMILIES, "granite", Family())


@_shown_by(family="gpt2")
def positions_added_on_each_stage(patch: pytest.MonkeyPatch) -> None:
    from stack.models import build

    def table(_self: Any, positions: torch.Tensor) -> torch.Tensor:
        # Values as large as those of the real table. An equal shift of all features would disappear in the next norm.
        return 0.02 * (positions[..., None] * torch.arange(1.0, 1 + SHAPE["hidden_size"])).sin()

    patch.setattr(build._Nothing, "forward", table)


@_shown_by(kind="packed")
def later_stages_do_not_see_where_documents_begin(patch: pytest.MonkeyPatch) -> None:
    from stack.models.build import Stage

    def forward(real: Any, self: Any, x: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if not self.first:
            positions = torch.arange(positions.shape[-1]).expand_as(positions)
        return real(self, x, positions, labels)

    _wrap(patch, Stage, "forward", forward)


# The auxiliary loss of a mixture of experts.


@_shown_by(family="mixtral")
def auxiliary_loss_of_the_last_stage_alone(patch: pytest.MonkeyPatch) -> None:
    from stack.models.build import Stage

    def forget(stage: Any) -> None:
        stage.router = stage.router if stage.last else None

    _after_init(patch, Stage, forget)


@_shown_by(family="qwen3_moe")
def auxiliary_loss_not_scaled(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel.engine import Engine

    def unscale(engine: Any) -> None:
        for router in engine._routers:
            router.scale = lambda: 1.0

    _after_init(patch, Engine, unscale)


@_shown_by(family="olmoe")
def auxiliary_loss_counted_twice(patch: pytest.MonkeyPatch) -> None:
    from stack.models.router import Router

    def double(router: Any) -> None:
        router._coefficient *= 2

    _after_init(patch, Router, double)


# Precision.


@_shown_by(settings={"precision__dtype": "bf16"})
def sums_in_bf16(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel.rank_engine import RankEngine

    def lower(engine: Any) -> None:
        for parameter in engine.parameters:
            parameter.grad_dtype = parameter.dtype

    _after_init(patch, RankEngine, lower)
    # Without this the engine itself would notice the fault.
    patch.setattr("stack.parallel.engine._check_dtypes", lambda *_: None)


@_shown_by(zero=2, settings={"precision__dtype": "bf16"})
def reduced_through_a_bf16_buffer(patch: pytest.MonkeyPatch) -> None:
    from stack.parallel.zero import ZeroEngine

    def lower(engine: Any) -> None:
        engine._optimizer._gradient_reduction_buffer_dtype = lambda: torch.bfloat16

    _after_init(patch, ZeroEngine, lower)
