"""A rank that fails inside a step raises its error without waiting for other ranks."""

import contextlib
import time
from datetime import timedelta

import pytest

from tests.helpers.tiny import replica_batch, tiny_config

_LEFT_OPEN: list[contextlib.ExitStack] = []


def fail_on_rank_0_after_a_backward(zero_stage: int) -> float:
    """Called on every rank: seconds from an error on rank 0 until the caller has it, while rank 1 stays in the step."""
    import torch
    import torch.distributed as dist

    from stack.parallel.engine import Engine
    from stack.parallel.mesh import make_mesh
    from stack.plan.layout import make_plan

    cfg = tiny_config(parallel__pipeline=1, parallel__zero=zero_stage)
    plan = make_plan(cfg, dist.get_world_size())
    mesh = make_mesh(plan, timeout=timedelta(seconds=30))
    engine = Engine(cfg, plan, mesh)
    batch = replica_batch(cfg, 0, replica=mesh.replica, replicas=mesh.replicas, kind="full")
    steps = contextlib.ExitStack()
    _LEFT_OPEN.append(steps)
    steps.enter_context(engine.rank_engine.accumulate())
    ids, labels = torch.from_numpy(batch.input_ids[0]), torch.from_numpy(batch.labels[0])
    positions = torch.from_numpy(batch.positions[0])
    loss = engine.rank_engine.forward(0, ids, positions=positions, labels=labels)
    engine.rank_engine.backward(loss, None, last=False)
    began = time.monotonic()
    if mesh.rank == 0:
        with contextlib.suppress(KeyError), steps:
            raise KeyError("a bug in the middle of a step")
    return time.monotonic() - began


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_an_error_inside_a_step_comes_out_at_once(ranks, zero_stage):
    assert ranks(2).run(fail_on_rank_0_after_a_backward, zero_stage)[0] < 5
