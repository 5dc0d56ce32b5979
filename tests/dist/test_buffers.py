"""Under 1F1B the number of a rank's receive buffers does not grow with the number of microbatches, and an evaluation
makes no new ones."""

from datetime import timedelta

from tests.helpers.tiny import replica_batch, tiny_config


def count_buffers() -> tuple[int, int, int, bool, int]:
    """Number of distinct receive buffers for hidden states and for gradients after a step, and of microbatches; whether
    the buffers are the same after an evaluation and another step; and the number of outputs that the evaluation left
    behind."""
    import torch.distributed as dist

    from stack.parallel.engine import Engine
    from stack.parallel.mesh import make_mesh
    from stack.plan.layout import make_plan

    cfg = tiny_config(parallel__pipeline=4, batch__global_size=16)
    plan = make_plan(cfg, dist.get_world_size())
    mesh = make_mesh(plan, timeout=timedelta(seconds=60))
    engine = Engine(cfg, plan, mesh)
    batches = [replica_batch(cfg, number, replica=0, replicas=1, kind="full") for number in range(3)]
    engine.train_batch(batches[0], lr=1e-3)
    stage = engine._pipeline.stages[0]

    def distinct(received: dict) -> set[int]:
        buffers = [getattr(info, "buffer", None) for infos in received.values() for info in infos]
        return {buffer.data_ptr() for buffer in buffers if buffer is not None}

    before = distinct(stage.args_recv_info), distinct(stage.grad_recv_info)
    engine.eval_batch(batches[1])
    left = len(stage.fwd_cache) + len(stage.output_chunks)
    engine.train_batch(batches[2], lr=1e-3)
    same = before == (distinct(stage.args_recv_info), distinct(stage.grad_recv_info))
    return len(before[0]), len(before[1]), plan.microbatches, same, left


def test_1f1b_keeps_as_many_buffers_as_stages(ranks):
    assert ranks(4).run(count_buffers) == [
        (0, 4, 16, True, 0),
        (4, 4, 16, True, 0),
        (4, 4, 16, True, 0),
        (4, 0, 16, True, 0),
    ]
