"""A difference between the two copies of a tied embedding ends the run."""

from datetime import timedelta

import pytest

from tests.helpers.tiny import tiny_config


def part_the_copies(zero_stage: int, changed: bool) -> None:
    """Called on every rank: compares the two copies of a tied embedding. With `changed`, one element of rank 0's copy
    differs in its last bit."""
    import torch
    import torch.distributed as dist

    from stack.parallel.engine import Engine
    from stack.parallel.mesh import make_mesh
    from stack.plan.layout import make_plan

    cfg = tiny_config(parallel__zero=zero_stage, shape__tie_word_embeddings=True)
    plan = make_plan(cfg, dist.get_world_size())
    mesh = make_mesh(plan, timeout=timedelta(seconds=30))
    engine = Engine(cfg, plan, mesh).rank_engine
    if changed and mesh.rank == 0:
        part = engine.own_part(engine.tied).view(-1)
        part[3] = torch.nextafter(part[3], part[3] + 1)
    engine.check_tied()


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_difference_of_one_bit_is_found(ranks, zero_stage):
    ranks(4).run(part_the_copies, zero_stage, False)
    with pytest.raises(AssertionError, match="no longer hold the same tied embedding"):
        ranks(4).run(part_the_copies, zero_stage, True)
