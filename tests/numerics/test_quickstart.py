"""The quickstart at its real size trains in its real layout as one rank does.

The tiny models of the parity matrix cannot show an error that grows with the number of elements: torch's fp32 norm on a
CPU is right for thousands of them and off by 1e-5 for a million.
"""

from datetime import timedelta
from typing import Any

import pytest

from tests.helpers.tiny import replica_batch

_STEPS = 5
_TIMEOUT_S = 150
_TOLERANCE = 1e-6
#: From the second step on, weights have moved by a whole learning rate.
_RECIPE = ["experiment=quickstart", "schedule.warmup_steps=1"]


def train(overrides: list[str]) -> list[tuple[float, float]]:
    """One rank's part: (loss, grad_norm) of each step. Called on every rank of a pool."""
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
