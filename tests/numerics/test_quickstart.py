"""The quickstart, at its real size and in its real layout, trains as on one rank.

The tiny models of the parity matrix cannot show an error that grows with the number of elements. torch's fp32 norm on a
CPU, for example, is right for thousands of elements and has an error of 1e-5 for a million.
"""

from datetime import timedelta
from typing import Any

import pytest

from tests.helpers.tiny import replica_batch

_STEPS = 5
_TIMEOUT_S = 150
_TOLERANCE = 1e-6
#: With this warm-up the full learning rate is used from the second step on.
_RECIPE = ["experiment=quickstart", "schedule.warmup_steps=1"]


def train(overrides: list[str]) -> list[tuple[float, float]]:
    """Called on every rank of a pool: (loss, grad_norm) of each step."""
    import torch.distributed as dist

    from stack.config.compose import compose
    from stack.parallel.engine import Engine
    from stack.parallel.mesh import make_mesh
    from stack.plan.layout import make_plan
    from stack.train.lr import learning_rate

    cfg = compose([*_RECIPE, *overrides])
    plan = make_plan(cfg, dist.get_world_size())
    mesh = make_mesh(plan, timeout=timedelta(seconds=60))
    engine = Engine(cfg, plan, mesh)
    found = []
    for step in range(_STEPS):
        batch = replica_batch(cfg, step, replica=mesh.replica, replicas=mesh.replicas, kind="packed")
        result = engine.train_batch(
            batch, lr=learning_rate(step, cfg.train.steps, optim=cfg.optim, schedule=cfg.schedule)
        )
        found.append((result.loss, result.grad_norm))
    return found


def test_loss_and_norm_are_those_of_one_rank(ranks):
    one = ["parallel.pipeline=1", "parallel.zero=0", "activation.checkpoint=none"]
    [alone] = ranks(1).run(train, one, timeout_s=_TIMEOUT_S)
    results: list[Any] = ranks(4).run(train, [], timeout_s=_TIMEOUT_S)
    for found in results:
        assert found == [pytest.approx(step, rel=_TOLERANCE) for step in alone]
