"""Ranks exchange values of any length as JSON."""

from typing import Any

VALUES: list[Any] = [None, "", "é\udcff" * 300, {"a": [1, 2.5, float("inf"), True]}, [[]], 10**20]


def exchanged() -> tuple[list[Any], list[Any]]:
    import torch.distributed as dist

    from stack.parallel import messages

    group = dist.new_group(backend="gloo")
    rank = dist.get_rank()
    gathered = [messages.gather([rank, value] if rank else value, group) for value in VALUES]
    return gathered, [messages.broadcast(value if rank == 0 else None) for value in VALUES]


def test_every_rank_gets_what_every_other_one_has(ranks):
    for gathered, told in ranks(2).run(exchanged):
        assert gathered == [[value, [1, value]] for value in VALUES]
        assert told == VALUES
