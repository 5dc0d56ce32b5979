"""Gradients of ZeRO stage 0 are averaged in a few collectives."""


def averaged(bucket_bytes: int) -> tuple[list[list[float]], int]:
    """Means of gradients of several shapes, and the number of collectives."""
    import torch
    import torch.distributed as dist

    from stack.parallel import replicated

    group, reduce, calls = dist.group.WORLD, dist.all_reduce, []

    def counted(*arguments, **options):
        calls.append(1)
        return reduce(*arguments, **options)

    before, replicated.REPLICATED_BUCKET_BYTES = replicated.REPLICATED_BUCKET_BYTES, bucket_bytes
    dist.all_reduce = counted
    try:
        rank = float(dist.get_rank())
        gradients = [torch.full((2, 3), rank), torch.full((5,), 10 * rank), torch.full((), rank + 1)]
        replicated.average(gradients, group)
    finally:
        dist.all_reduce, replicated.REPLICATED_BUCKET_BYTES = reduce, before
    return [gradient.flatten().tolist() for gradient in gradients], len(calls)


def test_means_are_the_same_whatever_shares_a_collective(ranks):
    means = [[0.5] * 6, [5.0] * 5, [1.5]]
    assert ranks(2).run(averaged, 1 << 20) == [(means, 1)] * 2
    assert ranks(2).run(averaged, 30) == [(means, 2)] * 2
    assert ranks(2).run(averaged, 1) == [(means, 3)] * 2
