"""With a gradient that is not finite the update is skipped, with the fused kernel and without."""

import math
from datetime import timedelta
from typing import Any

import pytest

from tests.helpers.layouts import _full
from tests.helpers.tiny import replica_batch, tiny_config


def step_with_nan(settings: dict[str, Any]) -> tuple[float, float, bool, bool]:
    """Called on every rank: gradient norms of a step whose loss is NaN and of the next step, and for both steps whether
    they changed this rank's masters."""
    import torch.distributed as dist

    from stack.parallel.engine import Engine
    from stack.parallel.mesh import make_mesh
    from stack.plan.layout import make_plan

    cfg = tiny_config(**settings)
    plan = make_plan(cfg, dist.get_world_size())
    mesh = make_mesh(plan, timeout=timedelta(seconds=60))
    engine = Engine(cfg, plan, mesh)

    def train(step: int) -> tuple[float, bool]:
        before = _full(engine, "parameter")
        batch = replica_batch(cfg, step, replica=mesh.replica, replicas=mesh.replicas, kind="full")
        norm = engine.train_batch(batch, lr=1e-3).grad_norm
        after = _full(engine, "parameter")
        return norm, any((before[name] != after[name]).any() for name in before)

    train(0)
    poison = engine.stages[-1].register_forward_hook(lambda _module, _args, output: output * math.nan)
    poisoned, changed = train(1)
    poison.remove()
    norm, changed_next = train(2)
    return poisoned, norm, changed, changed_next


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_an_update_that_is_not_finite_is_left_out(ranks, zero, dtype, fused):
    settings = {"parallel__zero": zero, "precision__dtype": dtype, "optim__fused": fused}
    for poisoned, norm, changed, changed_next in ranks(4).run(step_with_nan, settings):
        assert not math.isfinite(poisoned)
        assert not changed
        assert math.isfinite(norm)
        assert changed_next
