"""No order of a schedule's transfers deadlocks where all transfers of a rank share one stream.

NCCL runs the transfers of a communicator one after the other, in the order in which the host starts them. A send or a
receive also waits for the computations that the host started before it. gloo has no such order, so that a wrong one
would show on GPUs only.
"""

from types import SimpleNamespace

import pytest
from torch import nn
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    FORWARD,
    FULL_BACKWARD,
    RECV_B,
    RECV_F,
    SEND_B,
    SEND_F,
    _Action,
)

from stack.parallel.schedule import _CLASSES

#: A schedule, and its stages on each rank.
CASES = [("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 3), ("interleaved_zero_bubble", 2), ("zbv", 2)]
_SENDS, _RECEIVES = (SEND_F, SEND_B), (RECV_F, RECV_B)


def orders(schedule: str, virtual: int, pipeline: int, microbatches: int) -> dict[int, list[_Action]]:
    """What each rank of the pipe starts, in order."""

    def stage(number: int) -> SimpleNamespace:
        return SimpleNamespace(
            **{"num_stages": pipeline * virtual, "group_size": pipeline, "group_rank": 0, "stage_index": number},
            **{
                "is_first": number == 0,
                "is_last": number == pipeline * virtual - 1,
                "has_backward": True,
                "submod": nn.Module(),
            },
        )

    made = _CLASSES[schedule]([stage(number) for number in range(virtual)], microbatches, loss_fn=lambda *_: None)
    return made.pipeline_order_with_comms


def stuck(order: dict[int, list[_Action]]) -> dict[int, _Action]:
    """Runs the order with one stream for the computations of a rank and one for its transfers, and returns the transfer
    that each rank waits for in the end; empty where all ended."""
    transfers = {
        rank: [a for a in actions if a.computation_type in _SENDS + _RECEIVES] for rank, actions in order.items()
    }
    computed = dict.fromkeys(order, 0)
    moved = dict.fromkeys(order, 0)
    arrived: set[_Action] = set()

    def compute(rank: int) -> bool:
        """Runs the computations whose input is there."""
        start = computed[rank]
        for action in order[rank][start:]:
            kind = action.computation_type
            needs = {FORWARD: RECV_F, FULL_BACKWARD: RECV_B, BACKWARD_INPUT: RECV_B}.get(kind)
            received = needs and _Action(action.stage_index, needs, action.microbatch_index)
            if received in transfers[rank] and received not in arrived:
                break
            computed[rank] += 1
        return computed[rank] > start

    def head(rank: int) -> _Action | None:
        """The first transfer of the rank's stream, once the computations before it have ended."""
        if moved[rank] == len(transfers[rank]):
            return None
        first = transfers[rank][moved[rank]]
        return first if order[rank].index(first) <= computed[rank] else None

    progress = True
    while progress:
        progress = sum(compute(rank) for rank in order) > 0
        heads = {head(rank): rank for rank in order}
        for action, sender in heads.items():
            if action is None or action.computation_type not in _SENDS:
                continue
            forward = action.computation_type == SEND_F
            stage = action.stage_index + (1 if forward else -1)
            taken = _Action(stage, RECV_F if forward else RECV_B, action.microbatch_index)
            if taken in heads:
                arrived.add(taken)
                moved[sender] += 1
                moved[heads[taken]] += 1
                progress = True
    return {rank: transfers[rank][done] for rank, done in moved.items() if done < len(transfers[rank])}


@pytest.mark.parametrize("pipeline", [2, 4, 8])
@pytest.mark.parametrize(("schedule", "virtual"), CASES)
def test_one_stream_for_all_transfers_of_a_rank_is_enough(schedule, virtual, pipeline):
    for microbatches in (pipeline, 2 * pipeline, 4 * pipeline):
        order = orders(schedule, virtual, pipeline, microbatches)
        assert len(order) == pipeline
        assert not stuck(order), f"{microbatches} microbatches"


def test_a_wrong_order_is_found():
    order = orders("1f1b", 1, pipeline=2, microbatches=2)
    assert not stuck(order)
    # Each rank starts its receive before the send that the other rank waits for.
    for rank, late, early in ((0, (SEND_F, 1), (RECV_B, 0)), (1, (SEND_B, 0), (RECV_F, 1))):
        send, receive = _Action(rank, *late), _Action(rank, *early)
        order[rank].remove(receive)
        order[rank].insert(order[rank].index(send), receive)
    assert stuck(order) == {0: _Action(0, RECV_B, 0), 1: _Action(1, RECV_F, 1)}
