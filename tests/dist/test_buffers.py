"""Under 1F1B the number of a rank's receive buffers does not grow with the number of microbatches."""

from datetime import timedelta

from tests.helpers.tiny import replica_batch, tiny_config


def count_buffers() -> tuple[int, int, int]:
    """Number of distinct receive buffers for hidden states and for gradients after a step, and of microbatches."""
    import torch.distributed as dist

    from stack.parallel.engine import Engine
    from stack.parallel.mesh import make_mesh
    from stack.plan.layout import make_plan

    cfg = tiny_config(parallel__pipeline=4, batch__global_size=16)
    plan = make_plan(cfg, dist.get_world_size())
    mesh = make_mesh(plan, timeout=timedelta(seconds=60))
    engine = Engine(cfg, plan, mesh)
    engine.train_batch(replica_batch(cfg, 0, replica=0, replicas=1, kind="full"), lr=1e-3)
    stage = engine._pipeline.stages[0]

    def distinct(received: dict) -> int:
        buffers = [getattr(info, "buffer", None) for infos in received.values() for info in infos]
        return len({buffer.data_ptr() for buffer in buffers if buffer is not None})

    return distinct(stage.args_recv_info), distinct(stage.grad_recv_info), plan.microbatches


def test_1f1b_keeps_as_many_buffers_as_stages(ranks):
    assert ranks(4).run(count_buffers) == [(0, 4, 16), (4, 4, 16), (4, 4, 16), (4, 0, 16)]
